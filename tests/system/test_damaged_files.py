"""Files that fastlm reads back, from strangers: damaged at random, they are read or refused in one
short line. Each kind has one schema (`fastlm.schema`), or is YAML or TOML of a task or gates.
"""

import json
import random
from pathlib import Path

import pytest
from damage import change_json, damage_bytes, outcome

from fastlm import stages
from fastlm.data.forget_log import read_forget_log
from fastlm.errors import InputError
from fastlm.evals import runner
from fastlm.evals.gates import gate_failures, read_gates
from fastlm.evals.harness_tasks import task_files
from fastlm.evals.results import RecordFile
from fastlm.evals.task import MultipleChoice, OpenQuestion, Task
from fastlm.evals.task_metrics import part_metrics, question_metrics, summarize_metrics
from fastlm.feedback.forget import forget, report_lines
from fastlm.feedback.gate import GateDecision
from fastlm.feedback.gate_metrics import read_scores, scores_of
from fastlm.pipeline.card import card
from fastlm.pipeline.diff import diff, render
from fastlm.pipeline.lineage import tree
from fastlm.pipeline.record import headline
from fastlm.pipeline.registry import open_registry
from fastlm.schema import read_document

ID = "0123456789abcdef" * 4


def entry(kind: str, leaf: str, number: int, **result) -> dict:
    """A record of a stage; ``number`` tells it from others."""
    id = f"{number:08x}" * 8
    provenance = {
        "finished_at": f"2026-11-{number:02}T00:00:00.000+00:00", "recipe": ID,
        "code": {"version": "1"}, "machine": {"cpu": "x", "threads": 2}, "ids": {leaf: id},
        "command": "fastlm run x", "hashes": {"a": id}, "earlier_ids": [{leaf: id[::-1]}],
        "inputs": {"corpus": [{"name": "data", "path": "data", "id": f"{1:08x}" * 8}]},
        "sources": [{"spec": "docs", "package": None, "licence": "MIT", "count": 1,
                     "files": {"a": id}}],
    }  # fmt: skip
    return {
        "kind": kind, "fingerprint": "f", "version": 1,
        "options": {"limit": number, "tasks": ["arc_easy"]},
        "inputs": {"model": ["pretrain"]}, "outputs": {leaf: leaf}, "seconds": 1.5,
        "result": {"loss": 2.0 + number, **result}, "file_sizes": {"a": 3},
        "provenance": provenance,
    }  # fmt: skip


def run(number: int) -> dict:
    models = {"m": {"bits_per_byte": 1.5, "tokens": 7}}
    stages = {
        "data": entry("data", "corpus", number),
        "pretrain": entry("pretrain", "model", number + 1),
        "eval": entry("eval", "scores", number + 2, models=models, tasks=[]),
    }
    return {"layout": 2, "stages": stages}


SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
SCORES = {
    "scores": {"rate": SCORE},
    "models": {
        "old": {"bits_per_byte": 1.5, "tokens": 3, "scores": {"a": SCORE}},
        "new": {"bits_per_byte": 1.2, "tokens": 3, "scores": {"a": SCORE}},
    },
    "tasks": [{"name": "t", "comparisons": [{"metric": "acc", "difference": 0.1, "low": 0.0,
               "high": 0.2, "n": 3, "model": "new"}]}],
    "ids": [{"name": "old", "id": ID}, {"name": "new", "id": ID}],
}  # fmt: skip
DECISION = {
    "promoted": True, "gates": [{"score": "a", "passed": True, "reason": ""}],
    "models": {"old": {"name": "a", "id": ID}},
}  # fmt: skip
GATES = '[[gate]]\nscore = "s.rate"\nmax = 0.5\n\n[[gate]]\nscore = "s.a"\nmin = -1e9\n'
TASK = """\
task: birds
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.jsonl}
test_split: test
output_type: multiple_choice
num_fewshot: 1
doc_to_text: "Question: {{ question }}\\nAnswer:"
doc_to_target: answer
doc_to_choice: ["a", "b"]
metric_list:
  - metric: acc
filter_list:
  - name: strict
    filter:
      - function: regex
        regex_pattern: "(\\\\w+)"
      - function: take_first
generation_kwargs: {until: ["\\n"], max_gen_toks: 9}
"""


def use_registry(path: Path) -> None:
    root = next(p for p in path.parents if p.name == "runs")
    registry = open_registry([root], update_index=False)
    for record in registry.records:
        json.dumps(tree(registry, record)), headline(record.entry), record.short_id
        if record.model:
            card(registry, record, kinds=stages.KINDS)
    if path.name == "stages.json" and len({r.run for r in registry.records}) > 1:
        rows = diff(registry, "good", "bad", kinds=stages.KINDS)
        render(rows, "good", "bad"), json.dumps(rows, default=str)
    list(report_lines(forget([root], ["http://a"], dry_run=True), True))
    if registry.warnings:
        raise InputError(registry.warnings[0])


def use_scores(path: Path) -> None:
    gate_failures(read_gates(path.parent / "gates.toml"), scores_of("s", read_scores(path)))


def task_of(kind: str) -> Task:
    pairs = (("q", " a"), ("q", " b"))
    if kind == "open":
        questions = [OpenQuestion(str(i), "q", {}, " a") for i in range(3)]
        return Task("t", "facts", questions, "", "", "", judge=lambda items: [1.0] * len(items))
    questions = [MultipleChoice(str(i), pairs, 0, pairs, part="p") for i in range(3)]
    return Task("t", "facts", questions, "", "", "", normalisation="unconditional")


def use_records(path: Path) -> None:
    task = task_of(path.stem)
    with RecordFile(path, {}, runner.schema_of(task)) as results:
        for number, (question, record) in enumerate(zip(task.questions, results.records), 2):
            runner.check_record(task, question, record, 1, f"{path}:{number}")
        if len(results.records) == 3:
            figures = question_metrics(task, results.records)
            summarize_metrics(task, figures), json.dumps(part_metrics(task, figures))


def jsonl(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


OPEN = [{"id": str(i), "answers": ["a"], "scores": [1.0], "gold": -1.0} for i in range(3)]
CHOICES = [
    {"id": str(i), "logprob": [-1.0, -2.0], "tokens": [1, 2], "unconditional": [-1.0, -3.0]}
    for i in range(3)
]
LOG = {"time": "2026", "request_keys": [ID], "keys": ["a"], "content_ids": [ID]}
# name of the file: its content, what reads it
KINDS = {
    "bad/stages.json": (json.dumps(run(4)).encode(), use_registry),
    "bad/record.json": (
        json.dumps({"layout": 2, "stages": {".": entry("pretrain", "model", 8)}}).encode(),
        use_registry,
    ),
    "index.jsonl": (
        jsonl({"name": "gone/eval", "entry": entry("eval", "scores", 9)}),
        use_registry,
    ),
    "scores.json": (json.dumps(SCORES).encode(), use_scores),
    "decision.json": (
        json.dumps(DECISION).encode(),
        lambda path: read_document(path, GateDecision),
    ),
    "gates.toml": (GATES.encode(), read_gates),
    "open.jsonl": (jsonl({"version": 3}, *OPEN), use_records),
    "choices.jsonl": (jsonl({"version": 3}, *CHOICES), use_records),
    "task.yaml": (TASK.encode(), task_files),
    "forget_log.jsonl": (jsonl(LOG), lambda path: read_forget_log(path.parent)),
}


@pytest.fixture
def folder(tmp_path):
    for name, (data, _) in KINDS.items():
        if not name.startswith(("bad", "index")):
            (tmp_path / name).write_bytes(data)
    for stage in ("data", "pretrain", "eval"):
        for name in ("good", "bad"):
            (tmp_path / "runs" / name / stage).mkdir(parents=True)
    (tmp_path / "runs" / "good" / "stages.json").write_text(json.dumps(run(1)))
    return tmp_path


def damage(folder: Path, name: str, seeds: range) -> dict[str, int]:
    """How many damaged copies of a kind of file were read, and refused."""
    data, use = KINDS[name]
    path = folder / ("runs" if name.startswith(("bad", "index")) else "") / name
    counts = {"fine": 0, "refused": 0}
    for seed in seeds:
        draw = random.Random(seed)
        bytes_ = data
        if path.suffix in (".json", ".jsonl") and draw.random() < 0.7:
            rows = [json.loads(line) for line in data.splitlines()]
            row = draw.randrange(len(rows))
            rows[row] = (
                change_json(rows[row], draw) if draw.random() < 0.9 else draw.choice(([], 3, "x"))
            )
            bytes_ = jsonl(*rows)
        else:
            bytes_ = damage_bytes(data, draw)
        path.write_bytes(bytes_)
        try:
            counts[outcome(lambda: use(path))] += 1
        except Exception as error:
            error.add_note(f"{name}, seed {seed}: {bytes_[:300]!r}")
            raise
    return counts


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused(name, folder):
    data, use = KINDS[name]
    path = folder / ("runs" if name.startswith(("bad", "index")) else "") / name
    path.write_bytes(data)
    assert outcome(lambda: use(path)) == "fine"
    counts = damage(folder, name, range(30))
    assert counts["refused"] > 5


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_read_or_refused(name, folder):
    damage(folder, name, range(30, 1000))


@pytest.mark.parametrize(
    ("key", "value", "refusal"),
    [
        ("inputs", {"corpus": [{"name": "x"}]}, "inputs.corpus[0].path: expected this field"),
        ("inputs", {"corpus": [{"name": "x", "path": "", "id": 3}]}, "[0].id: expected a string"),
        ("sources", [{"files": {}}], "sources[0].spec: expected this field, got nothing"),
        ("sources", [{"spec": "x", "count": "7"}], "sources[0].count: expected a whole number"),
        ("ids", {"model": None}, "ids.model: expected a string, got None"),
        ("hashes", {"../../other": ""}, "hashes.'../../other': expected a path below its folder"),
        ("earlier_ids", [3], "earlier_ids[0]: expected an object, got 3"),
    ],
)
def test_a_record_with_a_field_of_another_kind_is_left_out(key, value, refusal, folder):
    """A damaged record of a run: each caused a traceback in `runs show`, `diff` or `forget`."""
    table = run(4)
    table["stages"]["eval"]["provenance"][key] = value
    (folder / "runs/bad/stages.json").write_text(json.dumps(table))
    registry = open_registry([folder / "runs"], update_index=False)
    assert {record.run for record in registry.records} == {"good"}
    (warning,) = registry.warnings
    assert f"bad/stages.json: stages.eval.provenance.{key}" in warning and refusal in warning
