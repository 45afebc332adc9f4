"""Generated question sets: the same in every run, scored by rules."""

import subprocess
import sys
from itertools import pairwise

import pytest
import question_files as files
from question_files import measure, oracle

from fastlm.errors import InputError
from fastlm.evals.registry import load_task
from fastlm.evals.sets import instructions
from fastlm.evals.sets.instructions import RULES
from fastlm.evals.sets.long_context import BYTES_PER_TOKEN
from fastlm.evals.task_metrics import part_metrics, question_metrics

PLANTED = "reasoning-gym:chain_sum?size=7&seed=3"


@pytest.mark.parametrize("name", ["needle:256,512", "hops:256", "chain_sum", PLANTED])
def test_an_oracle_is_right_and_silence_is_wrong(name, tmp_path):
    task = load_task(name, tmp_path)
    assert measure(task, oracle(task), tmp_path)[task.metric] == 1
    assert measure(task, files.FakeScorer(answer=lambda prompt: ""), tmp_path)[task.metric] <= 0.01


def test_sets_are_the_same_in_another_process(tmp_path):
    names = ["needle:256", "hops:256", "instruction_rules", PLANTED]
    code = (
        "import sys; from pathlib import Path; from fastlm.evals.registry import load_task\n"
        "print(*(load_task(n, Path('.')).hash for n in sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout.split() == [load_task(name, tmp_path).hash for name in names]


def test_a_needle_lies_at_its_depth_among_others(tmp_path):
    task = load_task("needle:512", tmp_path)
    assert len(task.questions) == 20
    for q in task.questions:
        (expected,) = q.row["expected"]
        assert abs(len(q.prompt) - 512 * BYTES_PER_TOKEN) < 120
        assert q.prompt.count("The number of the vault in") == 5  # four facts, and the answer
        depth = float(q.part.split()[-2]) / 100
        assert abs(q.prompt.index(expected) / len(q.prompt) - depth) < 0.25
    other = [q.row["expected"][0] for q in task.questions]
    assert len(set(other)) == len(other)


def test_needles_are_measured_by_length_and_depth(tmp_path):
    task = load_task("needle:256,512", tmp_path)
    short = {q.prompt: q.gold for q in task.questions if q.part.startswith("256")}
    with files.RecordFile(tmp_path / "records", {}) as results:
        records = files.run_questions(
            task, files.FakeScorer(answer=lambda p: short.get(p, " 1")), results
        )
    metrics = part_metrics(task, question_metrics(task, records))
    assert metrics["256 tokens"]["metrics"]["recall"]["value"] == 1
    assert metrics["512 tokens"]["metrics"]["recall"]["value"] == 0
    assert metrics["256 tokens, depth 50 %"]["questions"] == 4 and len(metrics) == 12


def test_hops_count_the_names_of_the_right_chain(tmp_path):
    task = load_task("hops:256", tmp_path)
    q = task.questions[-1]
    chain = q.row["expected"]
    assert len(chain) == 5
    places = [q.prompt.index(f"{b} is the same as {a}.") for a, b in pairwise(chain)]
    assert places == sorted(places)
    answers = [(f"{chain[3]}, XXX and {chain[0]}", 0.4), ("ABC, DEF, QRS, TUV", 0)]
    answers.append((", ".join(["AAA"] * 9 + list(chain)), 0.8))  # a list of all names is not right
    for answer, score in answers:
        assert task.judge([(answer, q.row)]) == [pytest.approx(score)]


@pytest.mark.parametrize("name", ["needle:64", "hops:256,x", "needle:99999999", "needle:"])
def test_lengths_are_refused(name, tmp_path):
    if name == "needle:":
        assert load_task(name, tmp_path).questions
        return
    with pytest.raises(InputError, match="format: expected lengths of 128 to 1048576 tokens"):
        load_task(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reasoning-gym:chain_sun", "expected a generator"),
        ("reasoning-gym:codeio", "without evaluating text"),
        ("reasoning-gym:chain_sum?sise=3", "sise"),
        ("reasoning-gym:chain_sum?size=3", "expected size=4 or more"),
    ],
)
def test_generators_are_refused(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_task(name, tmp_path)


# kind of rule -> arguments, an answer that follows it, and answers that do not
RULE_CASES = {
    "words at least": ({"n": 3}, "one two-fold three", ["one two", ""]),
    "words at most": ({"n": 3}, "one it's three", ["one two three four", ""]),
    "sentences": ({"n": 2}, 'It is 3.5 m. "Is it?"', ["One. Two. Three.", "none"]),
    "sentences at most": ({"n": 2}, "One. Two!", ["One. Two. Three.", ""]),
    "paragraphs": ({"n": 2}, "a\nb\n \nc", ["a\nb", "a\n\nb\n\nc"]),
    "bullets": ({"n": 2}, "Two:\n* a\n - b", ["* a", "* a\n* b\n* c", "*a\n*b"]),
    "numbered": ({"n": 2}, "1. a\n2) b", ["1. a", "1.a\n2.b"]),
    "sections": ({"n": 2}, "Section 1\na\n**Section 2**", ["Section 1", "Section 2\nSection 1"]),
    "two answers": ({}, "a\n******\nb", ["a", "a ****** a", "a ******", "a ****** b ****** c"]),
    "title": ({}, "<<A day>>\ntext", ["A day", "text <<A day>>", "<<>> a"]),
    "keywords": ({"words": ["ocean", "forest"]}, "Ocean, forest.", ["ocean", "oceans forests"]),
    "keyword count": ({"word": "ocean", "n": 2}, "ocean Ocean", ["ocean oceans"]),
    "forbidden word": ({"word": "the"}, "other theme", ["The theme", ""]),
    "letter count": ({"letter": "b", "n": 2}, "Bob", ["boy"]),
    "lower case": ({}, "all é 1", ["All", "12"]),
    "upper case": ({}, "ALL É 1", ["ALl", ""]),
    "capital words": ({"n": 2}, "Two BIG DOGS", ["I AM", "A B C"]),
    "script": ({"script": "CYRILLIC"}, "Привет, 3!", ["Привет x", "3"]),
    "json": ({}, '```json\n{"a": [1]}\n```', ["{a: 1}", "text", "3", "[" * 10**5]),
    "begins with": ({"text": "In short"}, " In short, yes", ["in short", "So In short"]),
    "ends with": ({"text": "The end."}, "All. The end.\n", ["The end. x", "The end"]),
    "postscript": ({}, "Bye\nP.S. more", ["Bye P.S. more", "P.S."]),
    "no commas": ({}, "a b", ["a, b", ""]),
    "no digits": ({}, "a b", ["a 1", ""]),
    "highlights": ({"n": 2}, "*a b* and **c**", ["*a b*", "* a\n* b"]),
    "placeholders": ({"n": 2}, "[name], [day]", ["[name]", "[] []"]),
    "quoted": ({}, '"a b"', ["a b", '"', '"a" b']),
    "repeat": ({"text": "Say it."}, "Say it.\nIt.", ["Say it.", "It.", "say it. It."]),
    "choice": ({}, "Maybe.", ["I think yes", "", "none"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", RULES)
def test_rules_tell_right_from_wrong(kind):
    arguments, good, bad = RULE_CASES[kind]
    followed = RULES[kind].is_followed
    assert followed(good, **arguments)
    assert not [text for text in bad if followed(text, **arguments)]


def test_instructions_are_judged_strictly_and_loosely(tmp_path):
    task = load_task("instruction_rules", tmp_path)
    assert len(RULES) >= 20 and len(task.questions) == 5 * len(RULES)
    assert {q.part for q in task.questions} == set(RULES)
    for q in task.questions:
        groups = [RULES[kind].group for kind, _ in q.row["rules"]]
        assert len(set(groups)) == len(groups) and ("exclusive" not in groups or len(groups) == 1)
        for kind, arguments in q.row["rules"]:
            assert RULES[kind].instruction(arguments) in q.prompt
    row = {"rules": [["lower case", {}], ["no commas", {}]]}
    answers = ["Sure!\n*all* lower", "all lower", "Sure! all, lower"]
    pairs = [(answer, row) for answer in answers]
    assert instructions.strict_accuracy(pairs) == [0, 1, 0]
    assert instructions.loose_accuracy(pairs) == [1, 1, 0]
    assert instructions.rule_accuracy(pairs) == [0.5, 1, 0]
    metrics = measure(task, files.FakeScorer(answer=lambda prompt: "no"), tmp_path)
    assert 0 < metrics["strict"] <= metrics["loose"] <= metrics["rule_accuracy"] < 0.5
