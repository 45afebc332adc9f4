"""Questions of several turns: their rows, and the set in the package."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import fastlm
from fastlm.errors import InputError
from fastlm.evals.chat_questions import SETS, parse_chat_question, question_source

RIGHT = ("reasoning", "math", "coding", "extraction")  # categories with right answers
CATEGORIES = ("writing", "roleplay", "stem", "humanities", *RIGHT)
ROWS = [json.loads(line) for line in SETS["two-turn"].read_text().splitlines()]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"turns": []}, "turns: expected the user's messages, got []"),
        ({"turns": ["a", " "]}, "turns: expected the user's messages, got ['a', ' ']"),
        ({"turns": "a"}, "turns: expected a list of texts, got str"),
        ({"turns": ["a", 1]}, "turns, 2: expected text, got int"),
        ({"turns": ["a"], "prompt": "b"}, 'expected "turns" or a prompt, got "turns" and "prompt"'),
        ({"turns": ["a", "b"], "reference": ["x"]}, "reference: expected 2, one per turn, got 1"),
        ({"turns": ["a", "b"], "reference": "x"}, "reference: expected 2, one per turn, got 1"),
        ({"prompt": "a", "reference": ["x", ""]}, "reference: expected 1, one per turn, got 2"),
        ({"turns": ["a"], "reference": [{}]}, "reference, 1: expected text, got dict"),
        ({"turns": ["a"], "category": 3}, "category: expected text, got int"),
        (["a"], "expected an object with a prompt or messages, got list"),
        ({"turns": None}, "expected an object with a prompt or messages, got no keys"),
    ],
)
def test_rows_that_are_refused(row, text):
    with pytest.raises(InputError, match=re.escape(text)):
        parse_chat_question(row)


def test_a_row_of_fastchat():
    row = {"question_id": 81, "category": "math", "turns": ["1 + 1?", "Twice that?", "And now?"]}
    question = parse_chat_question({**row, "reference": ["2", None, ""], "system": "Be brief."})
    system = {"role": "system", "content": "Be brief."}
    assert question.messages([]) == [system, {"role": "user", "content": "1 + 1?"}]
    assert question.messages(["two", "four"]) == [
        system, {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Twice that?"}, {"role": "assistant", "content": "four"},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert [question.reference(i) for i in range(3)] == ["2", "", ""]
    assert question.category == "math"
    assert question.key() != parse_chat_question({**row, "turns": row["turns"][:2]}).key()
    single = parse_chat_question({"prompt": "1 + 1?", "reference": "2"})
    assert single.messages([]) == single.prompt.messages and single.reference(0) == "2"
    assert parse_chat_question({"prompt": "a", "reference": ""}).references == ()


def test_the_two_turn_set():
    questions = [parse_chat_question(row) for row in ROWS]
    assert len(questions) == len({row["question_id"] for row in ROWS}) == 40
    assert Counter(q.category for q in questions) == dict.fromkeys(CATEGORIES, 5)
    for row, question in zip(ROWS, questions):
        assert len(question.turns) == 1
        assert len(question.references) == (2 if question.category in RIGHT else 0)
        assert all(question.references)
        assert row["question_id"].rpartition("-")[0] == row["category"]
        assert all(len(turn) < 400 and turn == turn.strip() for turn in row["turns"])
    assert len({turn for row in ROWS for turn in row["turns"]}) == 80


def test_references_of_programs_are_right():
    references = {row["question_id"]: row.get("reference") for row in ROWS}
    names: dict = {}
    exec(references["coding-1"][0], names)
    assert names["count_vowels"]("Education") == 5 and references["coding-1"][1][0] == "5"
    for text in references["coding-3"]:
        exec(text, names)
        assert names["largest"]([3, 9, 2]) == 9 and names["largest"]([-4]) == -4
    assert names["largest"]([]) is None


def test_sources():
    assert question_source("questions:two-turn") == str(SETS["two-turn"])
    assert question_source("a/questions.jsonl") == "a/questions.jsonl"
    assert question_source("reasoning-gym:chain_sum") == "reasoning-gym:chain_sum"
    with pytest.raises(InputError, match="data: expected one of questions:two-turn, got"):
        question_source("questions:three-turn")


def test_a_wheel_has_the_set():
    root = Path(fastlm.__file__).parent
    (pattern,) = re.findall(r'"fastlm.evals": \["(.*)"\]', (root.parent / "setup.py").read_text())
    assert SETS["two-turn"] in (root / "evals").glob(pattern)
