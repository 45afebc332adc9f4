"""Preferences: the recognised row formats, refusals and their messages,
and how comparisons become pairs, labels, demonstrations and rows again.
"""

import json

import pytest

from fastlm.data.conversations import RowCounts
from fastlm.data.preferences import (
    Comparison,
    UnpairedPreference,
    UnrankedAnswers,
    parse_answers,
    parse_preference,
    read_preferences,
)
from fastlm.data.prompts import Prompt, parse_prompt
from fastlm.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


USER, GOOD, BAD, POOR = user("2+2?"), bot("4"), bot("5"), bot("6")
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLED = [{**bot(""), "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
TEXTS = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
LIST = {"prompt": "2+2?", "answers": ["5", "4", "6"]}

# Each is read as the pair 4 > 5 after `prompt`
PAIRS = {
    "texts": (TEXTS, [USER]),
    "messages": ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
    "one message": ({"prompt": "2+2?", "chosen": GOOD, "rejected": BAD}, [USER]),
    "orca": ({"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}, [
        SYSTEM, USER,
    ]),
    "implicit prompt": (
        {"chosen": [USER, POOR, USER, GOOD], "rejected": [USER, POOR, USER, BAD]},
        [USER, POOR, USER],
    ),
    "ultrafeedback": (
        {
            "prompt": "2+2?", "prompt_id": "a0", "messages": [USER, GOOD],
            "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD],
        },
        [SYSTEM, USER],
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: 6\n\nHuman: No.\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: 6\n\nHuman: No.\n\nAssistant: 5",
        },
        [USER, POOR, user("No.")],
    ),
    "hh-rlhf with a prompt": ({**TEXTS, "prompt": "\n\nHuman: 2+2?\n\nAssistant:"}, [USER]),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"},
            ],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        [SYSTEM, USER],
    ),
    "alpaca": (
        {
            "instruction": "Add.", "input": "2+2?", "chosen": "4", "rejected": "5",
            "history": [["1+1?", "2"]], "system": "Be brief.",
        },
        [SYSTEM, user("1+1?"), bot("2"), user("Add.\n\n2+2?")],
    ),
    "openai": (
        {
            "input": {"messages": [USER]},
            "preferred_output": [GOOD], "non_preferred_output": [BAD],
        },
        [USER],
    ),
    "llama-factory's messages": (
        {
            "chosen_messages": [{**USER, "loss_weight": 0.0}, {**GOOD, "loss_weight": 1.0}],
            "rejected_messages": [{**USER, "loss_weight": 0.0}, {**BAD, "loss_weight": 1.0}],
        },
        [USER],
    ),
    "after a tool": (
        {"chosen": [USER, *CALLED, GOOD], "rejected": [USER, *CALLED, BAD]}, [USER, *CALLED],
    ),
    "list": ({"prompt": "2+2?", "responses": ["5", "4"], "scores": [1, 3]}, [USER]),
    "correction": ({"prompt": "2+2?", "answer": "5", "corrected": "4"}, [USER]),
}  # fmt: skip
# Each is read as the label of the answer 4 after `prompt`
LABELS = {
    "trl": ({"prompt": "2+2?", "completion": "4"}, [USER]),
    "trl's messages": ({"prompt": [USER], "completion": [GOOD]}, [USER]),
    "messages": ({"messages": [USER, BAD, user("No."), GOOD]}, [USER, BAD, user("No.")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        [USER],
    ),
    "alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, [USER]),
}

WANTED = (
    "expected an object with chosen and rejected, prompt with answers and ranks or scores, prompt"
    " with completion and label, or prompt with answer and corrected, got "
)
REFUSED = {
    WANTED + "str": "hello",
    WANTED + "'prompt', 'chosen'": {"prompt": "2+2?", "chosen": "4", "rejected": None},
    WANTED + "'prompt', 'answers'": LIST,
    WANTED + "'label'": {"label": True},
    "expected a prompt in addition to chosen and rejected, got 'chosen', 'rejected'": {
        "chosen": "4 is right", "rejected": "4 is wrong",
    },
    "chosen: expected text from the assistant, got an empty message": {**TEXTS, "chosen": " \n"},
    "rejected: expected an answer, got no message": {**TEXTS, "rejected": []},
    "prompt: expected text from the user, got an empty message": {**TEXTS, "prompt": ""},
    "chosen: expected text, got int": {**TEXTS, "chosen": 4},
    "chosen: expected user after system, got assistant":
        {**TEXTS, "prompt": [SYSTEM]},
    "prompt[1]: expected assistant after user, got user": {**TEXTS, "prompt": [USER, USER]},
    "chosen: expected user or tool after assistant, got assistant": {
        **TEXTS, "prompt": [USER, GOOD],
    },
    "expected an answer at the end, got tool": {**TEXTS, "prompt": [USER], "chosen": CALLED},
    "expected different answers, chosen and rejected are equal": {**TEXTS, "rejected": "4"},
    "chosen: expected an answer that differs from the others, got none": {
        "chosen": [USER, GOOD], "rejected": [USER, GOOD],
    },
    "rejected: expected an answer that differs from the others, got none": {
        "chosen": [USER, *CALLED, GOOD], "rejected": [USER, CALLED[0]],
    },
    "chosen[0]: expected one prompt for all answers, got a user's message after they differ": {
        "chosen": [USER, GOOD], "rejected": [user("3+3?"), BAD],
    },
    "chosen[2]: expected one prompt for all answers, got a user's message after they differ": {
        "chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, GOOD],
    },
    "prompt: expected the beginning of chosen and rejected, got another one": {
        "prompt": "3+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD],
    },
    "chosen: expected an answer by the assistant, got a conversation": {
        **TEXTS, "chosen": [USER, GOOD],
    },
    "system: expected none in addition to prompt[0], got two system messages": {
        **TEXTS, "system": "x", "prompt": [SYSTEM, USER],
    },
    "margin: expected a number >= 0, got -1.0": {**TEXTS, "margin": -1},
    "margin: expected a finite number, got nan": {**TEXTS, "margin": float("nan")},
    "margin: expected a finite number, got '1'": {**TEXTS, "margin": "1"},
    "margin: expected a finite number, got 1" + "0" * 59: {**TEXTS, "margin": 10**400},
    "score_chosen: expected at least score_rejected 2.0, got 1.0": {
        **TEXTS, "score_chosen": 1, "score_rejected": 2,
    },
    "ranks[1]: expected a whole number from 0 to 2, got 0.5": {**LIST, "ranks": [0, 0.5, 1]},
    "ranks[1]: expected a whole number from 0 to 2, got True": {**LIST, "ranks": [0, True, 2]},
    "ranks[2]: expected a whole number from 0 to 2, got 3": {**LIST, "ranks": [1, 2, 3]},
    "ranks[0]: expected a whole number from 0 to 2, got -1": {**LIST, "ranks": [-1, 0, 1]},
    "ranks: expected 0 for the best answer, got 1 as the lowest": {**LIST, "ranks": [1, 2, 2]},
    "ranks: expected one for each of 3 answers, got 2": {**LIST, "ranks": [0, 1]},
    "scores: expected one for each of 3 answers, got int": {**LIST, "scores": 7},
    "ranks: expected a better and a worse answer, all are tied": {**LIST, "ranks": [0, 0, 0]},
    "scores[1]: expected a finite number, got inf": {**LIST, "scores": [0, float("inf"), 1]},
    "scores: expected the order of the ranks, got 5.0 at rank 1 and 4.0 at rank 0":
        {**LIST, "ranks": [0, 1, 2], "scores": [4, 5, 3]},
    "expected different answers, answers 0 and 2 are equal": {
        "prompt": "2+2?", "answers": ["4", "5", "4"], "ranks": [0, 1, 2],
    },
    "answers: expected a list of two or more answers, got 1": {
        "prompt": "2+2?", "answers": ["4"], "ranks": [0],
    },
    "answers[1]: expected text from the assistant, got an empty message": {
        "prompt": "2+2?", "answers": ["4", ""], "ranks": [0, 1],
    },
    "expected different answers, corrected and answer are equal": {
        "prompt": "2+2?", "answer": "4", "corrected": "4",
    },
    "label: expected true or false, got 1": {"prompt": "2+2?", "completion": "4", "label": 1},
    "completion: expected text from the assistant, got an empty message": {
        "prompt": "2+2?", "completion": "", "label": False,
    },
    "expected an answer at the end, got user": {"messages": [USER], "label": True},
    "input: expected an object with messages, got '2+2?'": {
        "input": "2+2?", "preferred_output": [GOOD], "non_preferred_output": [BAD],
    },
    "rejected: expected valid Unicode, got a lone surrogate at 0": {**TEXTS, "rejected": "\ud800"},
}  # fmt: skip


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs(shape) -> None:
    row, prompt = PAIRS[shape]
    actual = parse_preference(row, "here")
    assert isinstance(actual, Comparison)
    (pair,) = actual.pairs()
    assert (pair.prompt, pair.answers, pair.ranks) == (prompt, ([GOOD], [BAD]), (0, 1))
    assert pair.location == "here" and actual.corrected == (shape == "correction")
    assert parse_preference(actual.to_row(), "here") == pair


@pytest.mark.parametrize("shape", LABELS)
@pytest.mark.parametrize("good", [True, False])
def test_labels(shape, good) -> None:
    row, prompt = LABELS[shape]
    actual = parse_preference({**row, "label": good})
    assert actual == UnpairedPreference(prompt, [GOOD], good)
    assert parse_preference(actual.to_row()) == actual


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message) -> None:
    with pytest.raises(InputError) as refusal:
        parse_preference(REFUSED[message])
    assert str(refusal.value) == message


def test_ranks_come_from_scores_and_skip_none() -> None:
    ranks = {}
    for scores in ([0.5, 2, -1], [3, 3, 1], [1, 1, 3]):
        actual = parse_preference({**LIST, "scores": scores})
        assert actual.scores == tuple(map(float, scores))
        ranks[tuple(scores)] = actual.ranks
    assert list(ranks.values()) == [(1, 0, 2), (0, 0, 1), (1, 1, 0)]
    assert parse_preference({**LIST, "ranks": [0, 0, 2]}).ranks == (0, 0, 1)  # as in sport


def test_a_list_becomes_pairs_and_labels() -> None:
    row = {**LIST, "answers": ["5", "4", "6", "four"], "scores": [1, 3, -1, 3], "rater": "ann"}
    actual = parse_preference({**row, "tools": [CALL]}, "here")
    pairs = [(p.answers[0][0]["content"], p.answers[1][0]["content"]) for p in actual.pairs()]
    assert pairs == [("4", "5"), ("4", "6"), ("four", "5"), ("four", "6"), ("5", "6")]
    assert [p.margin for p in actual.pairs()] == [2, 4, 2, 4, 2]
    assert {(p.rater, p.location, len(p.tools)) for p in actual.pairs()} == {("ann", "here", 1)}
    labels = [(label.answer[0]["content"], label.desirable) for label in actual.labels()]
    assert labels == [("4", True), ("6", False), ("four", True)]
    assert parse_preference(actual.to_row(), "here") == actual


def test_margins() -> None:
    assert parse_preference(TEXTS).margin is None
    assert parse_preference({**TEXTS, "margin": 0}).margin == 0
    scored = {**TEXTS, "score_chosen": 8.5, "score_rejected": 6}
    assert parse_preference(scored).margin == 2.5
    assert (
        parse_preference({**scored, "margin": 1}).margin == 1
    )  # an explicit margin takes precedence
    turned = parse_preference({"prompt": "2+2?", "answers": ["5", "4"], "scores": [1, 4]})
    (pair,) = turned.pairs()
    assert (turned.margin, pair.margin, pair.scores) == (3, 3, (4, 1))
    assert pair.answers == ([GOOD], [BAD])


def test_conversations_train_on_the_answer_only() -> None:
    answer = [*CALLED, GOOD]
    row = {"prompt": [USER, POOR, USER], "chosen": answer, "rejected": [BAD], "tools": [CALL]}
    actual = parse_preference(row, "here")
    best = actual.demonstration()
    assert best == actual.conversation(0) != actual.conversation(1)
    assert best.messages == [USER, POOR, USER, *answer]
    assert best.loss_mask == [False] * 3 + [True, False, True]
    assert (best.tools, best.location) == ([CALL], "here")
    label = parse_preference({"messages": [USER, POOR, USER, GOOD], "label": True})
    assert label.conversation().loss_mask == [False, False, False, True]


def test_unranked_answers() -> None:
    assert parse_answers(LIST, "here") == UnrankedAnswers(
        [USER], ([BAD], [GOOD], [POOR]), None, "here"
    )
    ranked = {**LIST, "ranks": [2, 0, 1]}
    assert parse_answers(ranked) == parse_preference(ranked)
    assert parse_answers({**LIST, **TEXTS}) == parse_preference(TEXTS)
    with pytest.raises(InputError, match="answers 0 and 1 are equal"):
        parse_answers({"prompt": "2+2?", "answers": ["4", GOOD]})
    with pytest.raises(InputError, match=f"{WANTED}'prompt'"):
        parse_answers({"prompt": "2+2?"})


def test_prompts() -> None:
    for row in (
        {"prompt": "2+2?"}, {"messages": [USER]}, {"messages": [USER, GOOD]}, TEXTS,
        {"instruction": "2+2?", "output": "4"},
    ):  # fmt: skip
        assert parse_prompt(row, "here") == Prompt([USER], row, None, "here")
    assert parse_prompt({"messages": [USER, GOOD, USER, GOOD]}).messages == [USER, GOOD, USER]
    for row, message in (
        ({"text": "2+2?"}, "expected an object with a prompt or messages, got 'text'"),
        ({"prompt": " "}, "prompt: expected text from the user, got an empty message"),
        ({"messages": []}, "the answer: expected system or user first, got assistant"),
        ({"messages": [USER, USER]}, "messages[1]: expected assistant after user, got user"),
    ):
        with pytest.raises(InputError) as refusal:
            parse_prompt(row)
        assert str(refusal.value) == message


def test_rows_of_all_shapes_in_files(tmp_path) -> None:
    rows = [row for row, _ in PAIRS.values()]
    rows += [{**row, "label": True} for row, _ in LABELS.values()]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "x"}, TEXTS])))
    counts, messages = RowCounts(), []
    actual = list(
        read_preferences(
            [str(tmp_path)], cache=tmp_path, skip_bad=True, rows=counts, on_skip=messages.append
        )
    )
    assert len(actual) == 2 * len(rows) + 1
    assert actual[len(rows) - 1].location == f"{tmp_path / 'a.json'}, element {len(rows)}"
    assert (counts.total, dict(counts.by_reason)) == (2 * len(rows) + 2, {"malformed": 1})
    line = f"{tmp_path / 'b.jsonl'}, line {len(rows) + 1}: {WANTED}'prompt'"
    assert messages == [line]
    with pytest.raises(InputError) as refusal:
        list(read_preferences([str(tmp_path)], cache=tmp_path))
    assert str(refusal.value) == line
