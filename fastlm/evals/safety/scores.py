"""A score with its interval, the error of its judge, and the set it was measured on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.safety.judges import JudgeAccuracy
from fastlm.stats.intervals import CorrectedRate, rogan_gladen, wilson


@dataclass(frozen=True)
class SafetyScore:
    """What was measured.

    Args:
        name: measure.set.detail, as gates name it.
        what: the property, for the report: what the share is a share of.
        value: as counted; corrected for the judge's error where ``judge`` was measured on answers
            of this very score.
        low, high: interval of ``value`` at the confidence of the run.
        n: items.
        better: "lower", "higher" or "" where neither is.
        raw: the judged share before the correction; None without a judge.
        judge: its error on labelled answers; None where the value follows from likelihoods or
            exact matches.
        corrected: whether ``value`` is.
        sets: names in `fastlm.evals.safety.texts.SOURCES`.
        unit: "share", "bits" or "".
        more: further numbers, for the report.
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
        more = {"details": dict(self.details)} if self.details else {}
        return {k: getattr(self, k) for k in keys} | {"sets": list(self.sets)} | judge | more


def share_score(
    name: str,
    description: str,
    hits: float,
    n: int,
    *,
    confidence: float,
    judge: JudgeAccuracy | None = None,
    labelled: JudgeAccuracy | None = None,
    **others: Any,
) -> SafetyScore:
    """Return the score ``hits`` of ``n``, as counted.

    ``judge``: the error of the judge that counted, on labelled answers of other models. It stands
    beside the score and corrects nothing: error rates of another domain made an interval here that
    missed the truth (a specificity of 167/204 where it was 21/39, `ON_SMALL_MODELS` in
    `fastlm.evals.safety.judges`). ``labelled``: the same on labelled answers of this score, which
    do correct it, with both labels among them and a judge better than chance.
    """
    if n < 1:
        raise InputError(f"{name}: expected at least one item, got none")
    ends = wilson(hits, n, confidence)
    rate = CorrectedRate(hits / n, ends.low, ends.high)
    corrected = False
    if judge is not None and labelled is not None:
        judge = replace(labelled, other_domains=(judge, *judge.other_domains))
        errors = {"sensitivity": labelled.sensitivity, "specificity": labelled.specificity}
        corrected = all(total for _, total in errors.values())
        if corrected:
            try:
                rate = rogan_gladen(hits / n, n, **errors, confidence=confidence)
            except InputError:  # no better than chance: no rate follows
                rate = CorrectedRate(hits / n, 0.0, 1.0)
    return SafetyScore(
        name, description, rate.rate, rate.low, rate.high, n, judge=judge, corrected=corrected,
        raw=None if judge is None else hits / n, **others,
    )  # fmt: skip
