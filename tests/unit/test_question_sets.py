"""Question sets: templates, damaged data, and models with known scores."""

import json
import time
from collections import Counter

import pytest
import question_files as files
from question_files import always_first, measure, oracle
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.evals import latex, task_metrics
from fastlm.evals.answers import exact_match, f1
from fastlm.evals.latex import final_answer
from fastlm.evals.registry import SETS, load_task, task_names
from fastlm.evals.sets import mmlu, olmes
from fastlm.evals.task import ABILITIES

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
    """Return a cache with small stand-ins for all sets in Arrow files."""
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
    assert measure(task, oracle(task), tmp_path)["acc_olmes"] == 1
    lazy = measure(task, always_first(task), tmp_path)
    assert lazy["acc"] == lazy["acc_olmes"] == pytest.approx(task.chance)
    assert load_task(name, cache).hash == task.hash


def test_mmlu_asks_in_the_templates_of_lm_eval(cache):
    letters = load_task("mmlu:mc_5shot", cache).questions[1]
    context, answer = letters.requests[letters.gold]
    begin = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    prompt = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    assert context.startswith(f"{begin}What is 0 in abstract_algebra?\n{prompt} A\n\nWhat is 1")
    assert context.endswith(f"What is 1 in abstract_algebra?\n{prompt}") and answer == " B"
    assert context.count("Answer:") == 6
    words = load_task("mmlu:rc_0shot", cache).questions[1].requests[1]
    begin = "The following are questions (with answers) about abstract algebra.\n\n"
    assert words == (f"{begin}Question: What is 1 in abstract_algebra?\nAnswer:", " two")


def test_mmlu_is_measured_by_subject_and_field(cache, tmp_path):
    task = load_task("mmlu", cache)
    assert len(mmlu.FIELD_OF) == 57 and len(task.questions) == 57 * 4
    stem = {s for s, field in mmlu.FIELD_OF.items() if field == "STEM"}
    golds = {q.requests[q.gold] for q in task.questions if q.part in stem}
    knows_stem = files.FakeScorer(logprob=lambda *pair: -0.1 if pair in golds else -9.0)
    with files.RecordFile(tmp_path / "records", {}) as results:
        records = files.run_questions(task, knows_stem, results)
    parts = task_metrics.part_metrics(task, task_metrics.question_metrics(task, records))
    assert parts["STEM"]["questions"] == 4 * len(stem) == 76
    assert parts["STEM"]["metrics"]["acc"]["value"] == 1
    assert parts["astronomy"] == {**parts["anatomy"]}
    assert parts["virology"]["metrics"]["acc"]["value"] == 0.25  # four equals share it
    assert set(parts) == set(mmlu.FIELD_OF) | set(mmlu.FIELDS)


def test_glue_asks_in_the_templates_of_lm_eval(cache):
    effect, cause = load_task("copa", cache).questions[:2]
    assert effect.requests[1] == ("It rained therefore", "  the street was wet.")
    assert cause.requests[0] == ("It rained because", "  he sang.")
    rte = load_task("rte", cache).questions[0]
    questions = "A cat sat.\nQuestion: An animal sat 0. True or False?\nAnswer:"
    assert rte.requests == ((questions, " True"), (questions, " False")) and rte.gold == 0
    assert [a for _, a in load_task("cb", cache).questions[0].requests][2] == " Neither"


@pytest.mark.parametrize("name", ["triviaqa", "nq_open", "triviaqa:0shot"])
def test_questions_about_facts_are_judged_by_any_right_answer(name, cache, tmp_path):
    task = load_task(name, cache)
    assert len(task.questions) == (9 if "0shot" in name else 4)
    assert "is 5" in task.questions[-4].prompt
    assert measure(task, oracle(task), tmp_path)["exact_match"] == 1
    other = {q.prompt: f" {q.row['label'][-1].upper()}\nmore" for q in task.questions}
    assert measure(task, files.FakeScorer(answer=other.get), tmp_path)["exact_match"] == 1
    wrong = measure(task, files.FakeScorer(answer=lambda prompt: "Dr who"), tmp_path)
    assert wrong["exact_match"] == 0
    assert wrong["f1"] == (pytest.approx(0.5) if "trivia" in name else 0)


def test_damaged_arrow_files_are_refused(cache, tmp_path):
    rows = GLUE["rte"][1]
    path = files.write_arrow(tmp_path, "glue/rte", "validation", rows)
    for data in (path.read_bytes()[:200], b"", b"not arrow" * 40):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"data-.*arrow: expected an Arrow stream, got"):
            load_task("rte", tmp_path)
    for bad in ({"label": 2}, {"label": None}, {"sentence1": ""}):
        files.write_arrow(tmp_path, "glue/rte", "validation", [*rows[:2], {**rows[2], **bad}])
        with pytest.raises(InputError, match="rte, row 3: expected a question, got"):
            load_task("rte", tmp_path)
    without = [{k: v for k, v in row.items() if k != "sentence2"} for row in rows]
    files.write_arrow(tmp_path, "glue/rte", "validation", without)
    with pytest.raises(InputError, match=r"rte, row 1: expected a question, got KeyError: 'sent"):
        load_task("rte", tmp_path)
    with pytest.raises(InputError, match=r"expected data-\*.arrow, got none"):
        load_task("sst2", tmp_path)


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pyarrow.*pip install 'fastlm\[eval\]'"):
        load_task("rte", cache)


def test_unknown_formats_are_refused(cache):
    with pytest.raises(InputError, match="format: expected one of rc_0shot for rte, got '9shot'"):
        load_task("rte:9shot", cache)


def request(context: str, continuation: str, doc: dict, label=None, number: int = 0) -> dict:
    """Return a line of requests.jsonl.gz."""
    return {
        "doc": doc, "request": {"context": context, "continuation": continuation},
        "doc_id": number, "label": label,
    }  # fmt: skip


def test_gsm8k_is_judged_by_the_last_number(tmp_path):
    doc = {"question": "How much?", "answer": "2 * 3 = 6\n#### 1,006", "short_answer": "1,006"}
    rows = [request("Question: How much?\nAnswer:", " It is 1,006.", doc)]
    path = files.write_requests(tmp_path, "gsm8k", "gold_bpb_5shot", rows)
    task = load_task("gsm8k", tmp_path)
    assert measure(task, oracle(task), tmp_path)["exact_match"] == 1
    for answer, score in (("5, so 1006.00", 1), ("1006 of 7", 0), ("none", 0)):
        scorer = files.FakeScorer(answer=lambda prompt, answer=answer: answer)
        assert measure(task, scorer, tmp_path)["exact_match"] == score
    files.write_requests(
        tmp_path, "gsm8k", "gold_bpb_5shot", [*rows, request("a", " b", {"short_answer": "six"})]
    )
    with pytest.raises(
        InputError, match=r"requests.jsonl.gz, line 2: row: expected a number in the"
    ):
        load_task("gsm8k", tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"requests.jsonl.gz, line \d: expected JSON lines"):
        load_task("gsm8k", tmp_path)


def test_math_is_judged_by_the_final_answer(tmp_path):
    def doc(solution: str, kind: str) -> dict:
        return {"solution": solution, "type": kind, "level": "Level 1", "answer": "wrong"}

    for i, subject in enumerate(olmes.MATH):
        solution = f"As $x={i}$, it is $\\boxed{{\\frac{{{i}}}{{7}}}}$."
        rows = [request(f"Problem:\n{i}?\n\nSolution:", f" {solution}", doc(solution, subject))]
        files.write_requests(tmp_path, f"minerva_math_{subject}", "gold_bpb_0shot", rows)
    task = load_task("math", tmp_path)
    assert [q.part for q in task.questions] == list(olmes.MATH)
    assert measure(task, oracle(task), tmp_path)["exact_match"] == 1
    third = files.FakeScorer(
        answer=lambda prompt: "So the final answer is $2/7$. I hope it is correct."
    )
    assert measure(task, third, tmp_path)["exact_match"] == pytest.approx(1 / 7)
    files.write_requests(
        tmp_path, "minerva_math_500", "gold_bpb_0shot", [request("a", " b", doc("none", ""))]
    )
    with pytest.raises(InputError, match="line 1: solution: expected a boxed answer, got none"):
        load_task("math500", tmp_path)


SAME = [
    (r"\frac12", r"\dfrac{1}{2}"), (r"0.5", r"\tfrac{1}{2}"), (r"-\frac{3}{6}", "-1/2"),
    (r"1,000", "1000"), (r"10{,}000", r"10,\!000"), (r"\$18.90", "18.9"), (r"30^\circ", "30"),
    (r"x = 4", "4"), (r"y=2x+3", "2x + 3"), (r"x \in [-2,7]", "[-2,7]"), (r"\sqrt3", r"\sqrt{3}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}2)"), (r"\text{(C)}", "(C)"),
    (r"15\mbox{ cm}^2", "15"), (r"5\text{ inches}", "5"), (r"7, -2, \text{ and } -5", "7,-2,-5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"25\%", "25"), (r"the 3rd", "3rd"), (r"\text{Evelyn}", "Evelyn."),
]  # fmt: skip
OTHER = [
    ("4a-2", "4-2"), ("2x+3y-6=0", "x-1=0"), ("1,2", "12"), ("-3", "3"), ("", ""), ("2", "2.01"),
    (r"\frac{1}{0}", r"\frac{2}{0}"), (r"x^2", "x"), ("(1,2)", "[1,2]"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "other"), SAME)
def test_answers_in_latex_are_the_same(first, other):
    assert latex.is_equivalent(first, other) and latex.is_equivalent(other, first)


@pytest.mark.parametrize(("first", "other"), OTHER)
def test_answers_in_latex_differ(first, other):
    assert not latex.is_equivalent(first, other) and not latex.is_equivalent(other, first)


def test_the_final_answer_of_a_solution():
    cases = {
        "Final Answer: The final answer is $[2,5)$. I hope it is correct.": "$[2,5)$",
        r"so \boxed{1} and \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
        "The answer is 7.": "7",
        "we get $x$ and then $y+1$ at last": "y+1",
        r"so \boxed{\frac{1": "",
        "": "",
    }
    assert {text: latex.final_answer(text) for text in cases} == cases


def test_drop_joins_spans_and_counts_shared_words(tmp_path):
    doc = {"answers": [["two dogs", "cat"], ["cats"]], "passage": "Some."}
    rows = [request("Passage: Some.\nQuestion: What?\nAnswer:", " ('two dogs',)", doc)]
    files.write_requests(tmp_path, "drop", "bpb_5shot", rows)
    task = load_task("drop", tmp_path)
    assert task.questions[0].gold == " two dogs, cat"
    assert measure(task, oracle(task), tmp_path)["exact_match"] == 1
    scorer = measure(task, files.FakeScorer(answer=lambda prompt: " the two cats\nmore"), tmp_path)
    assert scorer["exact_match"] == 0 and scorer["f1"] == pytest.approx(2 / 3)
    files.write_requests(tmp_path, "drop", "bpb_5shot", [request("a", " b", {"answers": []})])
    with pytest.raises(InputError, match="line 1: expected a question, got IndexError"):
        load_task("drop", tmp_path)


def test_each_ability_has_three_sets_or_more():
    by_ability = Counter(listing.ability for listing in SETS.values())
    for ability in ("language", "reasoning", "mathematics", "coding", "facts"):
        assert by_ability[ability] >= 3
    assert set(by_ability) <= set(ABILITIES)
    assert all(s.licence and s.source and s.formats for s in SETS.values())
    assert task_names(["coding", "mmlu", "coding"])[-1] == "mmlu"
    assert task_names(["all"]) == list(SETS)


def test_the_catalogue_is_printed():
    listing = json.loads(CliRunner().invoke(app, ["tasks", "--json"]).stdout)
    assert [row["name"] for row in listing] == list(SETS)
    assert listing[0].keys() == {"name", "ability", "formats", "licence", "source"}
    table = CliRunner().invoke(app, ["tasks", "--ability", "coding"]).stdout
    assert "humaneval" in table and "hellaswag" not in table
    refused = CliRunner().invoke(app, ["tasks", "--ability", "cooking"])
    assert refused.exit_code == 2 and "ability: expected one of language" in refused.stderr


HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """Add."""\n', "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}  # fmt: skip
MBPP = {
    "task_id": 11, "text": "Add.", "code": "def add(a, b):\r\n    return a + b", "test_setup_code":
    "", "test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0"],
}  # fmt: skip


def test_questions_about_one_passage_are_a_group(tmp_path):
    example = "Sea -- Salt water.\nQuestion: is it wet?\nAnswer: yes\n\n"
    questions = [("Tree -- A plant.", "is it old"), ("Tree -- A plant.", "has it bark"),
             ("River -- It flows.", "is it old")]  # fmt: skip
    rows = [
        {"doc_id": i, "label": 0, "request": {
            "context": f"{example}{passage}\nQuestion: {question}?\nAnswer:",
            "continuation": f" {answer}",
        }}
        for i, (passage, question) in enumerate(questions) for answer in ("yes", "no")
    ]  # fmt: skip
    files.write_requests(tmp_path, "boolq", "rc_5shot", rows)
    groups = [q.group for q in load_task("boolq", tmp_path).questions]
    assert groups == ["Tree -- A plant.", "Tree -- A plant.", "River -- It flows."]


def test_an_answer_of_white_space_is_read_at_once():
    """A small model repeats line ends; a pattern took 229 s for 2,000 of them."""
    begin = time.process_time()
    for space in (" ", "\n"):
        assert final_answer("The final answer is " + space * 20_000) == ""
        assert final_answer("The answer is: 5" + space * 20_000 + "x").startswith("5")
    assert time.process_time() - begin < 2
    assert final_answer("The final answer is $7$. I hope it is correct.") == "$7$"


def test_nothing_is_no_right_answer():
    assert exact_match([("", {"label": ["A", "."]}), ("the", {"label": ["The The"]})]) == [0, 0]
    assert f1([("", {"label": ["."]})]) == [0]
