"""Question sets: templates, damaged data, and models whose scores are known."""

import pytest
import question_files as files
from question_files import always_first, measured, oracle

from fastlm.errors import InputError
from fastlm.evals import measures
from fastlm.evals.catalog import load_task
from fastlm.evals.sets import mmlu

GLUE = {
    "copa": ("super_glue/copa", [
        {"premise": "It rained.", "choice1": "He sang.", "choice2": "The street was wet.",
         "question": q, "idx": i, "label": i % 2}
        for i, q in enumerate(["effect", "cause"] * 2)
    ]),
    "rte": ("glue/rte", [
        {"sentence1": "A cat sat.", "sentence2": f"An animal sat {i}.", "label": i % 2, "idx": i}
        for i in range(4)
    ]),
    "cb": ("super_glue/cb", [
        {"premise": "He said so.", "hypothesis": f"so {i}", "label": i % 3, "idx": i}
        for i in range(6)
    ]),
    "sst2": ("glue/sst2", [
        {"sentence": f"fine film {i} ", "label": i % 2, "idx": i} for i in range(4)
    ]),
    "mrpc": ("glue/mrpc", [
        {"sentence1": f"a {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(4)
    ]),
}  # fmt: skip


def mmlu_rows(count: int, subject: str) -> list[dict]:
    return [
        {"question": f" What is {i} in {subject}? ", "subject": subject,
         "choices": ["one", "two", "three", "four"], "answer": i % 4}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that holds small stand-ins of all sets in Arrow files."""
    cache = tmp_path_factory.mktemp("cache")
    for folder, rows in GLUE.values():
        files.write_arrow(cache, folder, "validation", rows)
    for subject in mmlu.FIELD_OF:
        for split, count in (("dev", 5), ("test", 4)):
            home = f"{mmlu.HOME}/{subject}"
            files.write_arrow(cache, home, split, mmlu_rows(count, subject))
    trivia = [
        {"question": f"Who is {i}", "answer": {"value": f"Dr. {i}", "aliases": [f"the doctor {i}"]}}
        for i in range(9)
    ]
    files.write_arrow(cache, "trivia_qa/rc.wikipedia.nocontext", "validation", trivia)
    nq = [{"question": f"who is {i}", "answer": [f"A {i}", f"B {i}"]} for i in range(9)]
    files.write_arrow(cache, "nq_open/none", "validation", nq)
    return cache


@pytest.mark.parametrize("name", [*GLUE, "mmlu", "mmlu:mc_5shot"])
def test_an_oracle_is_right_and_always_a_is_at_chance(name, cache, tmp_path):
    task = load_task(name, cache)
    assert measured(task, oracle(task), tmp_path)["acc_olmes"] == 1
    lazy = measured(task, always_first(task), tmp_path)
    assert lazy["acc"] == lazy["acc_olmes"] == pytest.approx(task.chance)
    assert load_task(name, cache).hash == task.hash


def test_mmlu_asks_in_the_templates_of_lm_eval(cache):
    letters = load_task("mmlu:mc_5shot", cache).questions[1]
    context, answer = letters.requests[letters.gold]
    begin = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    shown = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    assert context.startswith(f"{begin}What is 0 in abstract_algebra?\n{shown} A\n\nWhat is 1")
    assert context.endswith(f"What is 1 in abstract_algebra?\n{shown}") and answer == " B"
    assert context.count("Answer:") == 6
    words = load_task("mmlu:rc_0shot", cache).questions[1].requests[1]
    begin = "The following are questions (with answers) about abstract algebra.\n\n"
    assert words == (f"{begin}Question: What is 1 in abstract_algebra?\nAnswer:", " two")


def test_mmlu_is_measured_by_subject_and_field(cache, tmp_path):
    task = load_task("mmlu", cache)
    assert len(mmlu.FIELD_OF) == 57 and len(task.questions) == 57 * 4
    stem = {s for s, field in mmlu.FIELD_OF.items() if field == "STEM"}
    golds = {q.requests[q.gold] for q in task.questions if q.part in stem}
    knows_stem = files.Known(likes=lambda *pair: -0.1 if pair in golds else -9.0)
    with files.Results(tmp_path / "records", {}) as results:
        records = files.ask(task, knows_stem, results)
    parts = measures.parts(task, measures.values(task, records))
    assert parts["STEM"]["questions"] == 4 * len(stem) == 76
    assert parts["STEM"]["measures"]["acc"]["value"] == 1
    assert parts["astronomy"] == {**parts["anatomy"]}
    assert parts["virology"]["measures"]["acc"]["value"] == 0.25  # four equals share it
    assert set(parts) == set(mmlu.FIELD_OF) | set(mmlu.FIELDS)


def test_glue_asks_in_the_templates_of_lm_eval(cache):
    effect, cause = load_task("copa", cache).questions[:2]
    assert effect.requests[1] == ("It rained therefore", " the street was wet.")
    assert cause.requests[0] == ("It rained because", " he sang.")
    rte = load_task("rte", cache).questions[0]
    asked = "A cat sat.\nQuestion: An animal sat 0. True or False?\nAnswer:"
    assert rte.requests == ((asked, " True"), (asked, " False")) and rte.gold == 0
    assert [a for _, a in load_task("cb", cache).questions[0].requests][2] == " Neither"


@pytest.mark.parametrize("name", ["triviaqa", "nq_open", "triviaqa:0shot"])
def test_questions_about_facts_are_judged_by_any_right_answer(name, cache, tmp_path):
    task = load_task(name, cache)
    assert len(task.questions) == (9 if "0shot" in name else 4)
    assert "is 5" in task.questions[-4].prompt
    assert measured(task, oracle(task), tmp_path)["exact_match"] == 1
    other = {q.prompt: f" {q.row['label'][-1].upper()}\nmore" for q in task.questions}
    assert measured(task, files.Known(says=other.get), tmp_path)["exact_match"] == 1
    wrong = measured(task, files.Known(says=lambda prompt: "Dr who"), tmp_path)
    assert wrong["exact_match"] == 0
    assert wrong["f1"] == (pytest.approx(0.5) if "trivia" in name else 0)


def test_damaged_arrow_files_are_refused(cache, tmp_path):
    rows = GLUE["rte"][1]
    path = files.write_arrow(tmp_path, "glue/rte", "validation", rows)
    for data in (path.read_bytes()[:200], b"", b"not arrow" * 40):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"data-.*arrow: wanted an Arrow stream, got"):
            load_task("rte", tmp_path)
    for bad in ({"label": 2}, {"label": None}, {"sentence1": ""}):
        files.write_arrow(tmp_path, "glue/rte", "validation", [*rows[:2], {**rows[2], **bad}])
        with pytest.raises(InputError, match="rte, row 3: wanted a question, got"):
            load_task("rte", tmp_path)
    without = [{k: v for k, v in row.items() if k != "sentence2"} for row in rows]
    files.write_arrow(tmp_path, "glue/rte", "validation", without)
    with pytest.raises(InputError, match=r"rte, row 1: wanted a question, got KeyError: 'sent"):
        load_task("rte", tmp_path)
    with pytest.raises(InputError, match=r"wanted data-\*.arrow, got none"):
        load_task("sst2", tmp_path)


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pyarrow.*pip install 'fastlm\[eval\]'"):
        load_task("rte", cache)


def test_unknown_formats_are_refused(cache):
    with pytest.raises(InputError, match="format: wanted one of rc_0shot for rte, got '9shot'"):
        load_task("rte:9shot", cache)
