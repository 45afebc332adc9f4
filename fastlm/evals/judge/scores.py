"""Scores of judged answers: shares and means with intervals, and the judge's error on labels."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from fastlm.evals.judge.grading import GradedItem
from fastlm.evals.judge.items import JudgeItem
from fastlm.evals.judge.labels import random_labels
from fastlm.evals.judge.rubric import TIE, A, B, Rubric
from fastlm.evals.judge.scale import Grade
from fastlm.evals.judge_accuracy import JudgeAccuracy
from fastlm.stats.intervals import clustered_wilson, mean_error, wilson

DOMAIN, UNSURE = "this model", "other labels"


def judge_scores(
    graded: Sequence[GradedItem],
    rubric: Rubric,
    labels: Mapping[str, Grade | None],
    *,
    min_labels: int,
    confidence: float,
) -> dict[str, dict[str, Any]]:
    """Return name -> value with its interval ``low`` to ``high``. Items without a grade are left
    out. Several answers to a prompt, and those to all turns of a conversation, are a cluster.

    - scale pass: "pass", the share of answers that pass;
    - scales 1-5 and 1-10: also "grade", the mean grade;
    - pairs: "win_rate" of the first answers (a tie counts half), "wins" and "losses" without the
      ties; "consistent", the share of pairs with the same grade in both orders; "first_position",
      the share of the inconsistent ones in which both orders preferred the answer in front.

    The main score ("grade", else "pass" or "win_rate") also stands for each turn, if there are
    several ("grade.turn.2"), and for each category ("grade.category.math").

    A score of a verdict ("pass", "wins", "losses") has the judge's accuracy on the random sample of
    labels (`JudgeAccuracy`). The labels correct it if there are at least ``min_labels`` of them,
    with both verdicts; else "uncorrected" says what is missing. Scores of turns and categories are
    not corrected.
    """
    judged = [g for g in graded if g.grade is not None]
    scores: dict[str, dict[str, Any]] = {}
    clusters = [g.item.cluster for g in judged]

    def share(
        name: str, description: str, values: Sequence[float], better: str,
        clusters: Sequence[str] = clusters,
    ) -> None:  # fmt: skip
        ends = clustered_wilson(values, clusters, confidence)
        scores[name] = _score(description, fmean(values), ends.low, ends.high, len(values), better)

    def mean_grade(
        name: str, description: str, values: Sequence[float], better: str,
        clusters: Sequence[str] = clusters,
    ) -> None:  # fmt: skip
        mean, highest = mean_error(values, clusters=clusters), float(rubric.grades[-1])
        ends = mean.interval(confidence) if len(set(clusters)) > 1 else None
        low, high = (None, None) if ends is None else (max(1.0, ends.low), min(highest, ends.high))
        scores[name] = _score(description, mean.mean, low, high, len(values), better, "")

    def verdict_share(
        name: str, description: str, verdict: Callable[[Grade], bool], better: str
    ) -> None:
        verdicts = {g.item.id: verdict(g.grade) for g in judged if g.grade is not None}
        share(name, description, [float(v) for v in verdicts.values()], better)
        people = {i: verdict(x) for i, x in labels.items() if i in verdicts and x is not None}
        sample = random_labels(verdicts, labels)
        scores[name] |= _with_error(
            scores[name], verdicts, people, set(sample), len(set(clusters)), min_labels, confidence
        )

    if rubric.scale == "pair":
        points = {A: 1.0, TIE: 0.5, B: 0.0}
        name, score = "win_rate", share
        description = "pairs that the first answer wins, ties count half"
        values = [points[str(g.grade)] for g in judged]
        share(name, description, values, "higher")
        verdict_share("wins", "pairs that the first answer wins", lambda g: g == A, "higher")
        verdict_share("losses", "pairs that the second answer wins", lambda g: g == B, "lower")
        consistent = [float(g.is_consistent) for g in judged]
        share("consistent", "pairs with the same grade in both orders", consistent, "higher")
        in_front = [g.grades == (A, B) for g in judged if not g.is_consistent]
        if in_front:
            ends = wilson(sum(in_front), len(in_front), confidence)
            scores["first_position"] = _score(
                "inconsistent pairs in which the answer in front won in both orders",
                fmean(in_front), ends.low, ends.high, len(in_front), "",
            )  # fmt: skip
    else:
        name, description, score = "pass", "answers that pass", share
        grades = [g.grade for g in judged if g.grade is not None]
        values = [float(rubric.passes(grade)) for grade in grades]
        verdict_share(name, description, rubric.passes, "higher")
        if rubric.scale != "pass":
            name, description, score = "grade", "mean grade", mean_grade
            values = [float(grade) for grade in grades]
            score(name, description, values, "higher")
    for part, indices in _parts([g.item for g in judged]).items():
        score(
            f"{name}.{part}", f"{description}, {part.replace('.', ' ', 1)}",
            [values[i] for i in indices], "higher", [clusters[i] for i in indices],
        )  # fmt: skip
    return scores


def _parts(items: Sequence[JudgeItem]) -> dict[str, list[int]]:
    """Return the indices of the items of each turn, if there are several, and of each category."""
    parts: dict[str, list[int]] = {}
    turns = {item.turn for item in items}
    for turn in sorted(turns) if len(turns) > 1 else ():
        parts[f"turn.{turn}"] = [i for i, item in enumerate(items) if item.turn == turn]
    for category in sorted({item.category for item in items} - {""}):
        parts[f"category.{category}"] = [
            i for i, item in enumerate(items) if item.category == category
        ]
    return parts


def _score(
    description: str, value: float, low: float | None, high: float | None, n: int, better: str,
    unit: str = "share",
) -> dict[str, Any]:  # fmt: skip
    return {
        "description": description, "value": value, "low": low, "high": high, "n": n,
        "better": better, "unit": unit,
    }  # fmt: skip


def _with_error(
    score: Mapping[str, Any],
    verdicts: Mapping[str, bool],
    people: Mapping[str, bool],
    sample: set[str],
    prompts: int,
    min_labels: int,
    confidence: float,
) -> dict[str, Any]:
    """Return the fields of a score that depend on labels."""

    def accuracy(ids: set[str], text: str, domain: str) -> JudgeAccuracy | None:
        pairs = [(verdicts[id], label) for id, label in people.items() if id in ids]
        return JudgeAccuracy.from_pairs(pairs, f"{len(pairs)} {text}", domain) if pairs else None

    measured = accuracy(sample, "labels of a random sample of these answers", DOMAIN)
    if measured is None:
        return {"corrected": False, "uncorrected": "no labels of a random sample"}
    further = accuracy(
        people.keys() - sample, "labels of answers that are no random sample", UNSURE
    )
    measured = replace(measured, other_domains=() if further is None else (further,))
    fields: dict[str, Any] = {
        "raw": score["value"], "corrected": False, "judge": measured.as_dict(confidence),
    }  # fmt: skip
    # answers to the same prompt count as one item: the interval is rather too wide
    rate = measured.corrected_rate(
        score["value"], prompts, min_labels=min_labels, confidence=confidence
    )
    if rate is None:
        counts = Counter(people[id] for id in sample)
        fields["uncorrected"] = (
            f"expected {min_labels} random labels with both verdicts, got {counts[True]} positive"
            f" and {counts[False]} negative ones"
        )
        return fields
    return {**fields, "value": rate.rate, "low": rate.low, "high": rate.high, "corrected": True}
