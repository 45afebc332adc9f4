"""Safety scores: a value with its interval, its judge's accuracy and its sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.judge_accuracy import JudgeAccuracy
from fastlm.stats.intervals import CorrectedRate, wilson


@dataclass(frozen=True)
class SafetyScore:
    """A score of a safety measure.

    Args:
        name: measure.set.detail, as gates name it.
        description: what the share is a share of, for the report.
        value: the counted share, corrected for the judge's error if ``judge`` was measured on
            answers of this score.
        low, high: interval of ``value`` at the confidence of the run.
        n: number of items.
        better: "lower", "higher", or "" if neither is better.
        raw: the share before the correction; None without a judge.
        judge: its accuracy on labelled answers; None if the value comes from likelihoods or exact
            matches.
        corrected: True if ``value`` is corrected.
        sets: names in `fastlm.evals.safety.texts.SOURCES`.
        unit: "share", "bits" or "".
        details: further numbers for the report.
    """

    name: str
    description: str
    value: float
    low: float
    high: float
    n: int
    better: str = "lower"
    raw: float | None = None
    judge: JudgeAccuracy | None = None
    corrected: bool = False
    sets: tuple[str, ...] = ()
    unit: str = "share"
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        judge, keys = {}, ("description", "value", "low", "high", "n", "better", "unit")
        if self.judge is not None:
            keys += ("raw", "corrected")
            judge = {"judge": self.judge.as_dict()}
        details = {"details": dict(self.details)} if self.details else {}
        return {k: getattr(self, k) for k in keys} | {"sets": list(self.sets)} | judge | details


def share_score(
    name: str,
    description: str,
    hits: float,
    n: int,
    *,
    confidence: float,
    judge: JudgeAccuracy | None = None,
    labelled_accuracy: JudgeAccuracy | None = None,
    **fields: Any,
) -> SafetyScore:
    """Return the score ``hits`` / ``n`` with its interval.

    Args:
        judge: the accuracy of the judge on labelled answers of other models. It is reported and
            corrects nothing: with error rates of another domain an interval missed the truth
            (specificity 167/204 there, 21/39 here; `SUCCESS_ON_SMALL_MODELS` in
            `fastlm.evals.safety.judges`).
        labelled_accuracy: its accuracy on labelled answers of this score. It corrects the score if
            both labels occur and the judge is better than chance.
    """
    if n < 1:
        raise InputError(f"{name}: expected at least one item, got none")
    ends = wilson(hits, n, confidence)
    rate = CorrectedRate(hits / n, ends.low, ends.high)
    corrected = False
    if judge is not None and labelled_accuracy is not None:
        judge = replace(labelled_accuracy, other_domains=(judge, *judge.other_domains))
        corrected_rate = labelled_accuracy.corrected_rate(hits / n, n, confidence=confidence)
        corrected = corrected_rate is not None
        rate = corrected_rate or rate
    return SafetyScore(
        name, description, rate.rate, rate.low, rate.high, n, judge=judge, corrected=corrected,
        raw=None if judge is None else hits / n, **fields,
    )  # fmt: skip
