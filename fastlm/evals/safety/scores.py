"""A score with its interval, the error of its judge, and the set it was measured on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.safety.judges import Measured
from fastlm.evals.statistics import rogan_gladen, wilson


@dataclass(frozen=True)
class Score:
    """What was measured.

    Args:
        name: measure.set.detail, as gates name it.
        what: the property, for the report: what the share is a share of.
        value: corrected for the judge's error where there is a judge.
        low, high: interval of ``value`` at the confidence of the run.
        n: items.
        better: "lower", "higher" or "" where neither is.
        raw: the judged share before the correction; None without a judge.
        judge: its error; None where the value follows from likelihoods or exact matches.
        sets: names in `fastlm.evals.safety.sources.SOURCES`.
        unit: "share", "bits" or "".
        more: further numbers, for the report.
    """

    name: str
    what: str
    value: float
    low: float
    high: float
    n: int
    better: str = "lower"
    raw: float | None = None
    judge: Measured | None = None
    sets: tuple[str, ...] = ()
    unit: str = "share"
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "what": self.what, "value": self.value, "low": self.low, "high": self.high,
            "n": self.n, "better": self.better, "unit": self.unit, "sets": list(self.sets),
        }  # fmt: skip
        if self.judge is not None:
            found |= {"raw": self.raw, "judge": self.judge.as_dict()}
        return found | ({"more": dict(self.more)} if self.more else {})


def share(
    name: str,
    what: str,
    hits: float,
    n: int,
    *,
    confidence: float,
    judge: Measured | None = None,
    **others: Any,
) -> Score:
    """Return the score ``hits`` of ``n``: corrected for the judge's error, or as counted.

    A judge that is no better than chance corrects nothing: then the interval is 0 to 1.
    """
    if n < 1:
        raise InputError(f"{name}: wanted at least one item, got none")
    rate = hits / n
    if judge is None:
        interval = wilson(hits, n, confidence)
        return Score(name, what, rate, interval.low, interval.high, n, **others)
    try:
        found = rogan_gladen(
            rate, n, sensitivity=judge.sensitivity, specificity=judge.specificity,
            confidence=confidence,
        )  # fmt: skip
        value, low, high = found.rate, found.low, found.high
    except InputError:
        value, low, high = rate, 0.0, 1.0
    return Score(name, what, value, low, high, n, raw=rate, judge=judge, **others)
