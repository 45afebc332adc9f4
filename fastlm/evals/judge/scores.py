"""Scores of judged answers: shares and means with intervals, and the judge's error on labels."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

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
    labels (`JudgeAccuracy`); labels of a cluster are not independent. They correct the score if
    there are at least ``min_labels`` of them, with both verdicts; else "uncorrected" says what is
    missing. Scores of turns and categories are not corrected.
    """
    judged = [g for g in graded if g.grade is not None]
    score = _Scorer(judged, rubric, labels, min_labels, confidence)
    scores, main = score.pairs() if rubric.scale == "pair" else score.answers()
    for part, indices in _parts([g.item for g in judged]).items():
        scores[f"{main.name}.{part}"] = main.score(
            f"{main.description}, {part.replace('.', ' ', 1)}",
            [main.values[i] for i in indices], [score.clusters[i] for i in indices],
        )  # fmt: skip
    return scores


class _MainScore(NamedTuple):
    """The score that also stands for turns and categories. values: of each item. score: returns
    the score of some items, from a description, their values and their clusters."""

    name: str
    description: str
    values: list[float]
    score: Callable[[str, Sequence[float], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class _Scorer:
    """The scores of items, which all have a grade; see `judge_scores`."""

    judged: Sequence[GradedItem]
    rubric: Rubric
    labels: Mapping[str, Grade | None]
    min_labels: int
    confidence: float

    @cached_property
    def clusters(self) -> list[str]:
        return [g.item.cluster for g in self.judged]

    @cached_property
    def grades(self) -> list[Grade]:
        return [g.grade for g in self.judged if g.grade is not None]

    def pairs(self) -> tuple[dict[str, dict[str, Any]], _MainScore]:
        points = {A: 1.0, TIE: 0.5, B: 0.0}
        description = "pairs that the first answer wins, ties count half"
        main = _MainScore(
            "win_rate", description, [points[str(grade)] for grade in self.grades], self._share
        )
        consistent = [float(g.is_consistent) for g in self.judged]
        scores = {
            "win_rate": self._share(description, main.values, self.clusters),
            "wins": self._verdicts("pairs that the first answer wins", lambda g: g == A),
            "losses": self._verdicts(
                "pairs that the second answer wins", lambda g: g == B, "lower"
            ),
            "consistent": self._share(
                "pairs with the same grade in both orders", consistent, self.clusters
            ),
        }
        in_front = [g.grades == (A, B) for g in self.judged if not g.is_consistent]
        if in_front:
            ends = wilson(sum(in_front), len(in_front), self.confidence)
            scores["first_position"] = _score(
                "inconsistent pairs in which the answer in front won in both orders",
                fmean(in_front), ends.low, ends.high, len(in_front), "",
            )  # fmt: skip
        return scores, main

    def answers(self) -> tuple[dict[str, dict[str, Any]], _MainScore]:
        description = "answers that pass"
        scores = {"pass": self._verdicts(description, self.rubric.passes)}
        if self.rubric.scale == "pass":
            passed = [float(self.rubric.passes(grade)) for grade in self.grades]
            return scores, _MainScore("pass", description, passed, self._share)
        main = _MainScore("grade", "mean grade", [float(g) for g in self.grades], self._mean_grade)
        scores["grade"] = self._mean_grade(main.description, main.values, self.clusters)
        return scores, main

    def _share(
        self, description: str, values: Sequence[float], clusters: Sequence[str],
        better: str = "higher",
    ) -> dict[str, Any]:  # fmt: skip
        ends = clustered_wilson(values, clusters, self.confidence)
        return _score(description, fmean(values), ends.low, ends.high, len(values), better)

    def _mean_grade(
        self, description: str, values: Sequence[float], clusters: Sequence[str]
    ) -> dict[str, Any]:
        """Return a mean grade. If all clusters have the same mean, the grades do not show their
        spread: the interval is that of a share, the widest for grades of this scale."""
        mean, highest = mean_error(values, clusters=clusters), float(self.rubric.grades[-1])
        low = high = None
        if not mean.error:
            shares = [(value - 1) / (highest - 1) for value in values]
            ends = clustered_wilson(shares, clusters, self.confidence)
            low, high = (1 + (highest - 1) * end for end in (ends.low, ends.high))
        elif len(set(clusters)) > 1:
            ends = mean.interval(self.confidence)
            low, high = max(1.0, ends.low), min(highest, ends.high)
        return _score(description, mean.mean, low, high, len(values), "higher", "")

    def _verdicts(
        self, description: str, verdict: Callable[[Grade], bool], better: str = "higher"
    ) -> dict[str, Any]:
        """Return the share of items with a positive verdict, with the judge's accuracy."""
        verdicts = [verdict(grade) for grade in self.grades]
        score = self._share(description, [float(v) for v in verdicts], self.clusters, better)
        items = {g.item.id: (v, g.item.cluster) for g, v in zip(self.judged, verdicts, strict=True)}
        sample = random_labels(items, self.labels)

        def accuracy(labels: Mapping[str, Grade | None], text: str, domain: str) -> JudgeAccuracy:
            rows = [
                (items[id][0], verdict(label), items[id][1])
                for id, label in labels.items()
                if id in items and label is not None
            ]
            return JudgeAccuracy.from_pairs(
                [row[:2] for row in rows], f"{len(rows)} {text}", domain,
                clusters=[row[2] for row in rows], confidence=self.confidence,
            )  # fmt: skip

        if not sample:
            return {**score, "corrected": False, "uncorrected": "no labels of a random sample"}
        others = {id: label for id, label in self.labels.items() if id not in sample}
        further = accuracy(others, "labels of answers that are no random sample", UNSURE)
        measured = replace(
            accuracy(sample, "labels of a random sample of these answers", DOMAIN),
            other_domains=(further,) if further.agreement[1] else (),
        )
        score |= {
            "raw": score["value"], "corrected": False, "judge": measured.as_dict(self.confidence),
        }  # fmt: skip
        # answers to the same prompt count as one item: the interval is rather too wide
        rate = measured.corrected_rate(
            score["value"], len(set(self.clusters)), min_labels=self.min_labels,
            confidence=self.confidence,
        )  # fmt: skip
        if rate is None:
            counts = Counter(verdict(label) for label in sample.values())
            return {**score, "uncorrected": (
                f"expected {self.min_labels} random labels with both verdicts, got {counts[True]}"
                f" positive and {counts[False]} negative ones"
            )}  # fmt: skip
        return {**score, "value": rate.rate, "low": rate.low, "high": rate.high, "corrected": True}


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
