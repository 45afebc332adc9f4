"""`fastlm data prepare --decontaminate`: what contains a question is removed and named."""

import json
import random
import textwrap

from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.corpus import list_parts, read_documents
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.unit_files import read_lines
from fastlm.pipeline.funnel import Funnel

WORDS = "the of and river stone bird cloud house light paper sand glass wind bread tree".split()


def page(seed: int) -> str:
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=14)).capitalize() + f" {seed}." for _ in range(20)]
    return "\n\n".join(lines)


def call(*arguments, status: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_pages_with_questions_are_removed_and_named(tmp_path):
    questions = tmp_path / "exam.jsonl"
    texts = [f"How many of the {i} sailors saw the comet over the bay of {i}?" for i in range(9)]
    rows = [{"id": f"q{i}", "question": text} for i, text in enumerate(texts)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    pages = {f"{i}.txt": page(i) for i in range(12)}
    pages["exact.txt"] = f"{page(20)}\n\n{texts[3]}\n\n{page(21)}"
    pages["wrapped.txt"] = f"{page(22)}\n\n{textwrap.fill(texts[5].lower(), 16)}\n\n{page(23)}"
    for name, text in pages.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    call(
        "data", "prepare", tmp_path / "in", "-o", tmp_path / "out", "--decontaminate", questions,
        "--rules", "none",
    )  # fmt: skip
    documents = [*read_documents(tmp_path / "out", "train")]
    documents += read_documents(tmp_path / "out", "heldout")
    assert sorted(d.id for d in documents) == sorted(f"{i}.txt" for i in range(12))
    records = [r for p in list_parts(tmp_path / "out" / "removed") for r in read_lines(p)]
    assert {r["id"]: (r["step"], r["reason"], r["detail"]) for r in records} == {
        "exact.txt": ("contamination", "overlaps exam", f"1.00 of q3: {texts[3][:60]}"),
        "wrapped.txt": ("contamination", "overlaps exam", f"1.00 of q5: {texts[5][:60]}"),
    }
    steps = {s["step"]: s for s in Funnel.load(tmp_path / "out").steps}
    assert steps["contamination"]["removed"] == {"overlaps exam": 2}
    counts = [steps[s]["documents"] for s in ("quality rules", "contamination", "scrub")]
    assert counts == [14, 12, 12]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert len(plan["options"]["decontaminate_sha256"][0]) == 64

    # other questions are another plan
    questions.write_text(json.dumps({"question": texts[3]}))
    options = DataOptions(decontaminate=(str(questions),), rules=())
    prepare([str(tmp_path / "in")], tmp_path / "out", options=options, cache=tmp_path)
    ids = {d.id for split in ("train", "heldout") for d in read_documents(tmp_path / "out", split)}
    assert "wrapped.txt" in ids and "exact.txt" not in ids


def test_the_questions_of_tasks_are_written_and_found(tmp_path):
    out = tmp_path / "questions.jsonl"
    shown = call("tasks", "instruction_rules", "needle", "-o", out, "--cache", tmp_path).stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert shown.strip().endswith("questions of instruction_rules, needle")
    assert {row["set"] for row in rows} == {"instruction_rules", "needle"}
    planted = next(row for row in rows if row["set"] == "instruction_rules")
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.txt").write_text(page(i))
    (tmp_path / "in" / "copy.txt").write_text(f"{page(8)}\n\n{planted['question']}\n\n{page(9)}")
    options = DataOptions(decontaminate=(str(out),), rules=())
    funnel = prepare([str(tmp_path / "in")], tmp_path / "out", options=options, cache=tmp_path)
    steps = {s["step"]: s["removed"] for s in funnel.steps}
    assert steps["contamination"] == {"overlaps instruction_rules": 1}
    call("tasks", "needle", status=2)
    call("tasks", "-o", out, status=2)
    call("tasks", "nothing_such", "-o", out, status=2)
    call("tasks", "needle", "-o", tmp_path / "x.txt", status=2)
    missing = str(tmp_path / "missing")
    call("data", "prepare", tmp_path / "in", "-o", tmp_path / "no", "--decontaminate", missing,
         status=2)  # fmt: skip
