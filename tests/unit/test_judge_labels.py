"""Labels of judged answers: what is labelled, and what the labels say about the judge."""

import json
import math
import os
import threading
from contextlib import closing

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from fastlm.errors import InputError
from fastlm.evals.judge.grading import GradedItem
from fastlm.evals.judge.items import JudgeItem, make_items, read_items
from fastlm.evals.judge.labels import (
    LabelFile,
    confidence_key,
    label_order,
    merge_raters,
    random_labels,
    random_order,
    read_label_rows,
)
from fastlm.evals.judge.rubric import Rubric
from fastlm.evals.judge.scores import judge_scores
from fastlm.evals.judge_accuracy import JudgeAccuracy
from fastlm.evals.report import judge_blocks
from fastlm.stats.agreement import _kappa, cohen_kappa
from fastlm.stats.intervals import mean_error, wilson

PASS = Rubric.read("pass", None, 4)
FIVE = Rubric.read("1-5", None, 4)
TEN = Rubric.read("1-10", None)
PAIR = Rubric.read("pair", None, 4)
DRAWS = pytest.mark.parametrize(
    "draws", [150, pytest.param(2000, marks=pytest.mark.exhaustive)], ids=["short", "whole"]
)


def graded(id, *grades, probability=None):
    replies = tuple({"grade": g, "reason": "", "probability": probability} for g in grades)
    messages = [{"role": "user", "content": str(id)}]
    return GradedItem(JudgeItem(str(id), messages, ("a", "b")[: len(grades)]), replies)


def simulate(rng, n):
    """Return items and true labels. The judge errs on a third of hard answers and on few others;
    its probability is lower on hard ones."""
    hard = rng.random(n) < 0.3
    truth = rng.random(n) < 0.4
    wrong = rng.random(n) < np.where(hard, 0.35, 0.05)
    sure = np.where(hard, 0.6, 0.95) + 0.02 * rng.random(n)
    salt = rng.integers(2**60)
    items, labels = [], {}
    for i in range(n):
        verdict = bool(truth[i] ^ wrong[i])
        grade = "pass" if verdict else "fail"
        items.append(graded(f"{salt}-{i}", grade, probability=float(sure[i])))
        labels[f"{salt}-{i}"] = "pass" if truth[i] else "fail"
    return items, labels


@pytest.mark.parametrize("ends_early", [False, True])
@DRAWS
def test_only_the_random_half_measures_the_judge(draws, ends_early):
    """Half of the labels are of hard answers: with all labels the judge looks worse than it is.
    The interval of the corrected share covers the truth of the population. A rater may end early,
    after another session."""
    rng = np.random.default_rng(0)
    errors, all_errors, labelled, covered, corrected = [], [], 0, 0, 0
    for _ in range(draws):
        items, truth = simulate(rng, 250)
        order = label_order(items, PASS, 120)
        if ends_early:
            order = [*label_order(items, PASS, 60), *order[: rng.integers(60, 120)]]
        labels = {g.item.id: truth[g.item.id] for g in order}
        by_id = {g.item.id: g.grade for g in items}
        all_errors += [by_id[id] != label for id, label in labels.items()]
        score = judge_scores(items, PASS, labels, min_labels=30, confidence=0.95)["pass"]
        right, total = score["judge"]["agreement"]
        assert 30 <= total <= 60 and (ends_early or total == 60)
        errors.append(1 - right / total)
        labelled += total
        further = score["judge"]["other_domains"][0]["agreement"][1]
        assert further == len(labels) - total
        corrected += score["corrected"]
        covered += score["low"] <= 0.4 <= score["high"]
    expected = 0.3 * 0.35 + 0.7 * 0.05  # 0.14
    deviation = math.sqrt(expected * (1 - expected) / labelled)
    assert abs(np.mean(errors) - expected) < 4 * deviation
    assert np.mean(all_errors) > expected + 10 * deviation
    assert corrected == draws
    assert covered / draws > 0.95 - 3.1 * math.sqrt(0.95 * 0.05 / draws)


@pytest.mark.parametrize("generations", [2, 8])
@DRAWS
def test_intervals_cover_if_a_question_has_several_answers(draws, generations):
    """They are together in the random order. The judge errs on most answers to a hard question."""
    rng = np.random.default_rng(generations)
    agreement, kappa, corrected, covered = 0, 0, 0, 0
    for _ in range(draws):
        questions, salt = 400 // generations, rng.integers(2**60)
        shape = (questions, generations)
        truth = (rng.random((questions, 1)) < 0.5) ^ (rng.random(shape) < 0.1)
        wrong = (rng.random((questions, 1)) < 0.25) & (rng.random(shape) < 0.9)
        items, labels = [], {}
        for i, j in np.ndindex(shape):
            message = {"role": "user", "content": f"{salt}-{i}"}
            item = JudgeItem(f"{salt}-{i}-{j}", [message], (f"{j}",))
            grade = "pass" if truth[i, j] ^ wrong[i, j] else "fail"
            reply = {"grade": grade, "reason": "", "probability": float(rng.random())}
            items.append(GradedItem(item, (reply,)))
            labels[item.id] = "pass" if truth[i, j] else "fail"
        labels = {g.item.id: labels[g.item.id] for g in label_order(items, PASS, 100)}
        score = judge_scores(items, PASS, labels, min_labels=40, confidence=0.95)["pass"]
        low, high = score["judge"]["intervals"]["agreement"]
        agreement += low <= 1 - 0.25 * 0.9 <= high
        low, high = score["judge"]["intervals"]["kappa"]
        kappa += low <= 1 - 2 * 0.25 * 0.9 <= high  # half of the labels and of the grades pass
        corrected += score["corrected"]
        covered += score["low"] <= 0.5 <= score["high"]
    assert corrected > 0.9 * draws
    slack = 3.1 * math.sqrt(0.95 * 0.05 / draws)
    assert min(agreement, kappa, covered) / draws > 0.95 - slack


@DRAWS
def test_intervals_of_mean_grades_of_five_questions_cover(draws):
    """Most grades are 1, so that some samples have no other."""
    rng, shares = np.random.default_rng(5), [0.7, 0.1, 0.1, 0.05, 0.05]
    true = 1 + float(np.arange(5) @ shares)
    covered = 0
    for _ in range(draws):
        items = [graded(i, int(grade)) for i, grade in enumerate(1 + rng.choice(5, 5, p=shares))]
        score = judge_scores(items, FIVE, {}, min_labels=1, confidence=0.95)["grade"]
        covered += score["low"] <= true <= score["high"]
    assert covered / draws > 0.9 - 3.1 * math.sqrt(0.9 * 0.1 / draws)


def test_equal_grades_have_an_interval():
    items = [graded(i, 1) for i in range(5)]
    score = judge_scores(items, FIVE, {}, min_labels=1, confidence=0.95)["grade"]
    assert (score["value"], score["low"]) == (1, 1)
    assert score["high"] == pytest.approx(1 + 4 * wilson(0, 5).high)


def test_a_larger_sample_counts_answers_that_were_labelled_as_unsure():
    """The random sample is a prefix of the random order. An answer of it that an earlier session
    labelled because the judge was unsure belongs to it."""
    rng = np.random.default_rng(1)
    items, truth = simulate(rng, 200)
    first = label_order(items, PASS, 40)
    order = [*truth]
    unsure = {g.item.id for g in first} - set(order[:20])
    assert len(unsure) == 20
    more = label_order(items, PASS, 120)
    labels = {g.item.id: truth[g.item.id] for g in (*first, *more)}
    sample = random_labels(truth, labels)
    assert set(order[:60]) <= sample.keys() and unsure & set(order[:60]) <= sample.keys()
    assert unsure & set(order[:60])


def test_the_random_sample_ends_at_the_first_block_without_a_label():
    ids = [str(i) for i in range(34)]
    labels = {id: "pass" for id in ids} | {ids[2]: None}
    assert random_labels(ids, labels) == {id: "pass" for id in ids if id != ids[2]}
    del labels[ids[31]]
    assert [*random_labels(ids, labels)] == [id for id in ids[:30] if id != ids[2]]
    del labels[ids[15]]
    assert [*random_labels(ids, labels)] == [id for id in ids[:10] if id != ids[2]]
    assert random_labels(ids, {}) == {}


def test_the_random_order_is_that_of_hashes():
    ids = [str(i) for i in range(34)]
    order = random_order(ids)
    assert order != ids and sorted(order) == sorted(ids) and random_order(ids[::-1]) == order
    fewer = random_order(ids[:20])
    assert fewer == [id for id in order if id in fewer]


def test_half_of_the_labels_are_where_the_judge_is_least_sure():
    items = [graded(i, "pass", probability=0.5 + i / 100) for i in range(40)]
    order = [g.item.id for g in label_order(items, PASS, 20)]
    randoms = [g.item.id for g in items[:10]]
    rest = range(10, 20)
    assert len(order) == 20
    assert set(order) == {*randoms, *map(str, rest)}
    # each half keeps its order, so that an early end leaves a random sample
    assert [id for id in order if id in randoms] == randoms
    assert order[:10] != randoms and order[10:] != randoms
    assert len(label_order(items, PASS, 1000)) == 40
    assert label_order([graded("x", None)], PASS, 3) == []

    keys = [confidence_key(graded(0, g), FIVE) for g in (1, 3, 4, 5)]
    assert keys[0] > keys[3] > keys[1] == keys[2]
    sure, unsure, split = graded(0, "A", "B"), graded(0, "A", "B", probability=0.4), None
    split = graded(0, "A", "A", probability=0.9)
    assert confidence_key(split, PAIR) < confidence_key(unsure, PAIR) < confidence_key(sure, PAIR)


@pytest.mark.parametrize(
    ("grades", "grade", "consistent"),
    [
        (("A", "B"), "A", True), (("B", "A"), "B", True), (("tie", "tie"), "tie", True),
        (("A", "A"), "tie", False), (("B", "B"), "tie", False), (("tie", "A"), "tie", False),
        (("A", None), None, False), ((None, None), None, True),
    ],
)  # fmt: skip
def test_a_pair_is_won_in_both_orders(grades, grade, consistent):
    pair = graded(0, *grades)
    assert (pair.grade, pair.is_consistent) == (grade, consistent)


def test_scores_of_pairs_by_hand():
    pairs = [graded(0, "A", "B"), graded(1, "A", "B"), graded(2, "B", "A"), graded(3, "A", "A")]
    pairs += [
        graded(4, "tie", "tie"),
        graded(5, "B", "B"),
        graded(6, "A", "A"),
        graded(7, "A", None),
    ]
    scores = judge_scores(pairs, PAIR, {}, min_labels=1, confidence=0.95)
    values = {name: score["value"] for name, score in scores.items()}
    assert values == pytest.approx({
        "win_rate": (2 + 4 / 2) / 7, "wins": 2 / 7, "losses": 1 / 7, "consistent": 4 / 7,
        "first_position": 2 / 3,
    })  # fmt: skip
    assert scores["first_position"]["n"] == 3 and scores["wins"]["n"] == 7
    assert scores["wins"]["uncorrected"] == "no labels of a random sample"
    labels = {"0": "A", "1": "tie", "2": "B", "3": "A", "4": "tie", "5": "tie", "6": "B"}
    scores = judge_scores(pairs, PAIR, labels, min_labels=7, confidence=0.95)
    assert scores["wins"]["judge"]["sensitivity"] == [1, 2]
    assert scores["wins"]["judge"]["specificity"] == [4, 5]
    assert scores["losses"]["judge"]["sensitivity"] == [1, 2]
    assert scores["losses"]["judge"]["specificity"] == [5, 5]
    assert scores["wins"]["corrected"] and scores["wins"]["raw"] == pytest.approx(2 / 7)
    # (2/7 + 4/5 - 1) / (1/2 + 4/5 - 1)
    assert scores["wins"]["value"] == pytest.approx((2 / 7 - 0.2) / 0.3)


def test_grades_from_1_to_5_by_hand():
    items = [graded(i, grade) for i, grade in enumerate((1, 3, 4, 5, None))]
    scores = judge_scores(items, FIVE, {}, min_labels=1, confidence=0.95)
    assert scores["grade"]["value"] == 13 / 4 and scores["pass"]["value"] == 0.5
    assert 1 <= scores["grade"]["low"] < 13 / 4 < scores["grade"]["high"] <= 5
    assert scores["grade"]["unit"] == "" and scores["grade"]["n"] == 4
    labels = {"0": 2, "1": 4, "2": 5, "3": 4}
    table = judge_scores(items, FIVE, labels, min_labels=4, confidence=0.95)["pass"]["judge"]
    assert table["sensitivity"] == [2, 3] and table["specificity"] == [1, 1]


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        ({}, "no labels of a random sample"),
        (dict.fromkeys("0123", "pass"), "expected 4 random labels with both verdicts, got 4 pos"),
        ({"0": "pass", "1": "fail"}, "no labels of a random sample"),
        ({"0": "pass", "1": "fail", "2": "fail", "3": None}, "got 1 positive and 2 negative ones"),
    ],
)  # fmt: skip
def test_too_few_labels_correct_nothing(labels, missing):
    items = [graded(i, "pass" if i < 2 else "fail") for i in range(4)]
    score = judge_scores(items, PASS, labels, min_labels=4, confidence=0.95)["pass"]
    assert not score["corrected"] and missing in score["uncorrected"]
    assert (score["value"], score["n"]) == (0.5, 4) and ("judge" in score) == (len(labels) == 4)


def conversations(grades):
    """Return an item per grade, of conversations of two turns: (category, first, second)."""
    items = []
    for i, (category, *turns) in enumerate(grades):
        for turn, grade in enumerate(turns, 1):
            replies = ({"grade": grade, "reason": "", "probability": None},)
            if isinstance(grade, tuple):
                replies = tuple({**replies[0], "grade": g} for g in grade)
            messages = [{"role": "user", "content": f"{i} {turn}"}]
            item = JudgeItem(
                f"{i} {turn}", messages, ("a", "b")[: len(replies)], category=category, turn=turn,
                question_id=str(i),
            )  # fmt: skip
            items.append(GradedItem(item, replies))
    return items


def test_scores_of_conversations_by_hand():
    grades = [("math", 10, 4), ("math", 8, 2), ("stem", 7, 9), ("stem", 5, None), ("", 1, 1)]
    scores = judge_scores(conversations(grades), TEN, {}, min_labels=1, confidence=0.95)
    values = {name: (score["value"], score["n"]) for name, score in scores.items()}
    assert values == {
        "pass": (4 / 9, 9), "grade": (47 / 9, 9), "grade.turn.1": (31 / 5, 5),
        "grade.turn.2": (4.0, 4), "grade.category.math": (6.0, 4), "grade.category.stem": (7.0, 3),
    }  # fmt: skip
    assert scores["grade.turn.2"]["description"] == "mean grade, turn 2"
    assert scores["grade.category.math"]["description"] == "mean grade, category math"
    # the answers to a question are a cluster
    values, clusters = [10, 4, 8, 2, 7, 9, 5, 1, 1], [0, 0, 1, 1, 2, 2, 3, 4, 4]
    ends = mean_error(values, clusters=clusters).interval(0.95)
    assert scores["grade"]["high"] == ends.high != mean_error(values).interval(0.95).high
    # two clusters of the means 7 and 5: an error of 1 and one degree of freedom
    category, t = scores["grade.category.math"], 12.7062047
    ends = mean_error([10, 4, 8, 2], clusters=[0, 0, 1, 1]).interval(0.95)
    assert (ends.low, ends.high) == pytest.approx((6 - t, 6 + t))
    assert (category["low"], category["high"]) == (1, 10)  # within the scale
    table = judge_blocks({
        "models": {"a": {"scores": scores}}, "confidence": 0.95, "ungraded": 1, "items": 10,
    })[0]  # fmt: skip
    assert [getattr(row[0], "text", row[0]) for row in table.rows] == [*scores]


def test_scores_of_compared_conversations_by_hand():
    win, lose, tie = ("A", "B"), ("B", "A"), ("A", "A")
    pairs = conversations([("math", win, lose), ("math", win, tie), ("stem", win, win)])
    scores = judge_scores(pairs, PAIR, {}, min_labels=1, confidence=0.95)
    values = {name: s["value"] for name, s in scores.items() if name.startswith("win_rate")}
    assert values == pytest.approx({
        "win_rate": 4.5 / 6, "win_rate.turn.1": 1, "win_rate.turn.2": 0.5,
        "win_rate.category.math": 2.5 / 4, "win_rate.category.stem": 1,
    })  # fmt: skip
    passed = conversations([("math", "pass", "fail"), ("stem", "pass", "pass")])
    scores = judge_scores(passed, PASS, {}, min_labels=1, confidence=0.95)
    values = {name: score["value"] for name, score in scores.items()}
    assert values == {
        "pass": 0.75, "pass.turn.1": 1, "pass.turn.2": 0.5, "pass.category.math": 0.5,
        "pass.category.stem": 1,
    }  # fmt: skip


def test_one_prompt_has_no_interval_of_the_mean_grade():
    scores = judge_scores([graded(0, 4)], FIVE, {}, min_labels=1, confidence=0.95)
    assert scores["grade"]["low"] is None and scores["grade"]["value"] == 4
    result = {"models": {"a": {"scores": scores}}, "confidence": 0.95, "ungraded": 0, "items": 1}
    table = judge_blocks(result)[0]
    cells = [getattr(cell, "text", cell) for row in table.rows for cell in row]
    assert "not known" in cells and "4.00" in cells


def test_the_confidence_is_that_of_the_judges_intervals():
    items = [graded(i, "pass" if i < 5 else "fail") for i in range(20)]
    labels = {str(i): "pass" if i % 4 == 0 else "fail" for i in range(20)}
    for confidence in (0.5, 0.95):
        judge = judge_scores(items, PASS, labels, min_labels=5, confidence=confidence)["pass"][
            "judge"
        ]
        right, total = judge["agreement"]
        ends = wilson(right, total, confidence)
        assert judge["intervals"]["agreement"] == (ends.low, ends.high)


def test_answers_to_a_prompt_are_one_cluster():
    one = [graded(i, "pass" if i % 4 < 2 else "fail") for i in range(8)]
    again = [
        GradedItem(JudgeItem(f"{g.item.id} {k}", g.item.messages, ("a",)), g.replies)
        for g in one for k in range(5)
    ]  # fmt: skip
    wide = judge_scores(one, PASS, {}, min_labels=1, confidence=0.95)["pass"]
    same = judge_scores(again, PASS, {}, min_labels=1, confidence=0.95)["pass"]
    assert same["n"] == 40
    assert same["high"] - same["low"] > 0.95 * (wide["high"] - wide["low"])


# ---- labels in a file


def test_a_label_file_continues_and_keeps_the_labels_of_others(tmp_path):
    path = tmp_path / "labels.jsonl"
    with closing(LabelFile(path, PASS)) as labels:
        labels.add("Ann", "1", "pass")
        labels.add("Ann", "2", None)
        labels.add("Ann", "1", "fail")
    with closing(LabelFile(path, PASS)) as labels:
        assert labels.read() == {("1", "Ann"): "fail", ("2", "Ann"): None}
        labels.add("Bob", "1", "pass")
    with path.open("ab") as file:  # a kill in the middle of a line
        file.write(b'{"id": "3", "rat')
    with closing(LabelFile(path, PASS)) as labels:
        assert len(labels.read()) == 3
        labels.add("Ann", "3", "pass")
    rows = read_label_rows(path, PASS)
    assert rows == {
        ("1", "Ann"): "fail", ("2", "Ann"): None, ("1", "Bob"): "pass", ("3", "Ann"): "pass",
    }  # fmt: skip
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # by an editor
    with closing(LabelFile(path, PASS)) as labels:
        labels.add("Ann", "4", "fail")
    assert len(read_label_rows(path, PASS)) == 5


def test_a_label_that_the_disk_refuses_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    path = tmp_path / "labels.jsonl"
    with closing(LabelFile(path, PASS)) as labels:
        labels.add("Ann", "1", "pass")

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(InputError, match="No space left"):
                labels.add("Ann", "2", "pass")
        assert ("2", "Ann") not in labels.read()
        labels.add("Ann", "3", "fail")
    assert read_label_rows(path, PASS) == {("1", "Ann"): "pass", ("3", "Ann"): "fail"}


def test_two_processes_add_to_one_file(tmp_path, monkeypatch):
    path = tmp_path / "labels.jsonl"
    with closing(LabelFile(path, PASS)) as one, closing(LabelFile(path, PASS)) as other:
        one.add("Ann", "1", "pass")
        assert other.read() == {("1", "Ann"): "pass"}
        other.add("Ann", "1", "fail")
        other.add("Bob", "2", None)
        assert one.read() == {("1", "Ann"): "fail", ("2", "Bob"): None}
        fsync, begun = os.fsync, []

        def full_once(file):
            """Refuse the first label, while the other process adds one."""
            if begun:
                return fsync(file)
            begun.append(threading.Thread(target=other.add, args=("Bob", "3", "pass")))
            begun[0].start()
            begun[0].join(0.2)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_once)
        with pytest.raises(InputError, match="No space left"):
            one.add("Ann", "3", "pass")
        begun[0].join()
        assert one.read() == read_label_rows(path, PASS)
        assert one.read() == {("1", "Ann"): "fail", ("2", "Bob"): None, ("3", "Bob"): "pass"}
        copy = path.with_name("edited")  # an editor writes a new file
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        one.add("Ann", "4", "pass")
        assert read_label_rows(path, PASS) == other.read() == one.read()
        assert ("4", "Ann") in one.read()
        with path.open("a") as file:
            file.write("no label\n")
        size = path.stat().st_size
        with pytest.raises(InputError, match=r"labels\.jsonl:6: "):
            one.add("Ann", "4", "pass")
        assert path.stat().st_size == size
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
        assert one.read() == {("1", "Ann"): "pass"}


def test_the_label_of_most_raters_counts():
    votes = {
        ("1", "a"): "pass", ("1", "b"): "fail", ("1", "c"): "pass", ("2", "a"): "pass",
        ("2", "b"): "fail", ("3", "a"): None, ("3", "b"): "fail", ("4", "a"): None,
    }  # fmt: skip
    assert merge_raters(votes) == {"1": "pass", "2": None, "3": "fail", "4": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "rater": "a", "label": 4}, ":1: label: expected one of pass, fail, got 4"),
        ({"id": "1", "rater": "a", "label": True}, ":1: label"),
        ({"id": "1", "rater": "a"}, ":1: label"),
        ({"id": "1", "rater": "a", "label": "fail", "rubric": "x"}, ":1: rubric: expected a label"),
        ({"id": "", "rater": "a", "label": None}, ":1: id"),
    ],
)
def test_bad_labels_are_refused(tmp_path, row, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"rubric": PASS.key, **row}) + "\n")
    with pytest.raises(InputError, match=message):
        read_label_rows(path, PASS)


@pytest.mark.parametrize(
    "text",
    [
        "one line", '{"prompt": "a"}\n{"prompt": "b"}', '{"id": "1", "text": "a"}',
        '{"name": "a"}\n{"id": "2", "ra', '{"id": "1", "rater": "a", "label": "pass"}', '{"id": 1',
        "LABEL\n text", '{"id": "1", "a": ' + "[" * 100_000, "LABEL\n[1, 2]",
    ],
)  # fmt: skip
def test_a_file_that_has_no_labels_stays_as_it_is(tmp_path, text):
    path = tmp_path / "labels.jsonl"
    label = {"id": "1", "rater": "a", "label": "pass", "rubric": PASS.key}
    path.write_text(text := text.replace("LABEL", json.dumps(label)))
    with pytest.raises(InputError, match=r"labels\.jsonl:\d: "):
        LabelFile(path, PASS)
    assert path.read_text() == text


def test_labels_by_another_rubric_are_refused(tmp_path):
    path = tmp_path / "labels.jsonl"
    with closing(LabelFile(path, PASS)) as labels:
        labels.add("Ann", "1", "pass")
    assert read_label_rows(path, PASS) == {("1", "Ann"): "pass"}
    for rubric in (Rubric("pass", "Count the stones.", 4), Rubric("1-5", PASS.text, 4)):
        with pytest.raises(InputError, match=":1: rubric: expected a label by the judge's rubric"):
            read_label_rows(path, rubric)
        with pytest.raises(InputError, match="rubric"):
            LabelFile(path, rubric)
    # the threshold says which grades pass, not what a grade means
    assert FIVE.key == Rubric.read("1-5", None, 3).key


# ---- answers in a file


def test_rows_of_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Who?", "answer": "I."}, {"question": "Who?", "answer": ""}]
    rows += [{"messages": [{"role": "user", "content": "Who?"}], "answer": "I."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, empty, same = read_items([str(path)], cache=tmp_path)
    assert first.answers == same.answers == ("I.",) and empty.answers == ("",)
    assert len({first.id, empty.id, same.id}) == 3  # a sample may have an answer twice
    assert read_items([str(path)], cache=tmp_path)[2].id == same.id
    assert make_items([JudgeItem("", first.messages, ("I.", "you"))])[0].id != first.id
    for row, message in (
        ({"prompt": "Who?"}, 'expected an object with a prompt and "answer"'),
        ({"prompt": "Who?", "answer": 3}, "answer: expected text, got int"),
        ({"answer": "I."}, "expected an object with a prompt"),
        ({"prompt": "Who?", "answer": "a", "answer_b": "b"}, 'expected "answer_b" in all rows'),
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(InputError, match=message):
            read_items([str(path)], cache=tmp_path)


# ---- kappa


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    for classes in (2, 3):
        table = rng.integers(1, 20, (classes, classes))
        a, b = np.indices(table.shape).reshape(2, -1)
        first, second = a.repeat(table.ravel()), b.repeat(table.ravel())
        kappa, interval = cohen_kappa(table.tolist())
        assert kappa == pytest.approx(cohen_kappa_score(first, second))
        assert interval.low < kappa < interval.high
    full, interval = cohen_kappa([[5, 0], [0, 5]])
    assert full == 1 == interval.high and interval.low < 0.9
    assert cohen_kappa([[9, 0], [0, 0]])[0] == 0
    accuracy = JudgeAccuracy((8, 10), (15, 20), "", "")
    assert accuracy.kappa == cohen_kappa([[8, 5], [2, 15]])[0]
    assert accuracy.intervals()["kappa"] is not None
    assert JudgeAccuracy((0, 0), (3, 4), "", "").intervals()["sensitivity"] is None


def test_the_error_of_kappa_by_the_delta_method():
    """The variance of Fleiss, Cohen and Everitt is that of the gradient of kappa."""
    table = np.array([[20.0, 5, 2], [3, 17, 6], [4, 1, 30]])
    n, p = table.sum(), table / table.sum()
    gradient = np.zeros(9)
    for i in range(9):
        step = np.zeros(9)
        step[i] = 1e-6

        def kappa(q):
            rows, columns = q.sum(1), q.sum(0)
            agreed, chance = np.trace(q), rows @ columns
            return (agreed - chance) / (1 - chance)

        up, down = (p + sign * step.reshape(3, 3) for sign in (1, -1))
        gradient[i] = (kappa(up) - kappa(down)) / 2e-6
    flat = p.ravel()
    variance = (gradient**2 @ flat - (gradient @ flat) ** 2) / n
    assert _kappa(table)[1] == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("n", [30, 100])
@DRAWS
def test_the_interval_of_kappa_covers(n, draws):
    rng = np.random.default_rng(3)
    for p in ([0.5, 0.1, 0.1, 0.3], [0.8, 0.08, 0.05, 0.07], [0.25, 0.25, 0.25, 0.25]):
        true = cohen_kappa((np.array(p).reshape(2, 2) * 1e6).astype(int).tolist())[0]
        covered = 0
        for counts in rng.multinomial(n, p, draws):
            interval = cohen_kappa(counts.reshape(2, 2).tolist())[1]
            covered += interval.low <= true <= interval.high
        assert covered / draws > 0.94 - 3.1 * math.sqrt(0.95 * 0.05 / draws)
