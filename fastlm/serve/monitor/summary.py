"""A period in numbers: of all answers, or of a model's. Both the dashboard and alerts read them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastlm.serve.monitor.judges import Judge
from fastlm.serve.monitor.window import Answers, FeedbackRow, Period
from fastlm.serve.ratings import Rating
from fastlm.stats.summaries import mean, quantiles, rate

OK = 200
KINDS = ("comment", "corrected", "picked")
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens; edges between bars
# what alerts may name, besides the numbers that people give
RATES = (
    "refusal", "toxicity", "errors", "refused", "left", "cut", "feedback", "thumbs",
)  # fmt: skip
VALUES = (
    "per_minute", "queue_p95", "first_token_p50", "first_token_p95", "whole_p50", "whole_p95",
    "prompt_tokens_mean", "new_tokens_mean", "drift_psi", "drift_p",
)  # fmt: skip


def summary(period: Period, ratings: Sequence[Rating], judges: Sequence[Judge]) -> dict[str, Any]:
    """Summarise a period."""
    answers, minutes = period.answers, period.minutes
    status = answers["status"]
    good = answers.where(status == OK)
    told: dict[str, Any] = {
        "requests": len(answers),
        "answers": len(good),
        "per_minute": len(good) / minutes if minutes > 0 else 0.0,
        "errors": rate(int((status >= 500).sum()), len(answers)),
        "refused": rate(int((status == 429).sum()), len(answers)),
        "left": rate(int((status == 499).sum()), len(answers)),
        "cut": rate(int((good["finish_reason"] == "length").sum()), len(good)),
        "queue": quantiles(good["queue_seconds"]),
        "first_token": quantiles(good["first_token_seconds"]),
        "whole": quantiles(good["seconds"]),
        "prompt_tokens": _length(good["prompt_tokens"]),
        "new_tokens": _length(good["new_tokens"]),
    }
    for judge in judges:
        told[judge.kind] = judged(good, judge)
    return told | opinions(len(good), period.feedback, ratings)


def value_of(metric: str, told: Mapping[str, Any], drift: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric of a `summary` (or of `prompts_drift.drift`) with its interval where it has
    one, and how many answers it is of.
    """
    none: dict[str, Any] = {"value": None, "low": None, "high": None, "n": 0}
    if metric in told.get("metrics", {}):
        return none | _some(told["metrics"][metric])
    if metric in RATES:
        return none | _some(told[metric])
    if metric == "per_minute":  # no answers at all are a value, too
        return none | {"value": told["per_minute"], "n": 10_000}
    if metric.startswith("drift"):
        if not drift.get("enough"):
            return none
        value = drift["mmd"]["p"]
        if metric == "drift_psi":
            value = max(one["psi"] for one in drift["features"])
        return none | {"value": value, "n": drift["prompts"]}
    name, _, part = metric.rpartition("_")
    return none | {"value": told[name][part], "n": told[name]["n"]}


def _some(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("value", "low", "high", "n")}


def judged(good: Answers, judge: Judge) -> dict[str, Any]:
    """The rate of a judge, with its name, and how many answers another one judged."""
    scores, ids = good[judge.kind], good[f"{judge.kind}_judge"]
    mine = ids == judge.id
    found = rate(int((scores[mine] >= judge.threshold).sum()), int(mine.sum()))
    others = int((~mine & (ids != "")).sum())
    return found | {"judge": judge.id, "method": judge.method, "other_judges": others}


def opinions(
    answers: int, feedback: Sequence[FeedbackRow], ratings: Sequence[Rating]
) -> dict[str, Any]:
    """Feedback: the share of ``answers`` that have some, thumbs, and each declared number."""
    about = {row.key for row in feedback if row.key[1] >= 0 and row.model}
    thumbs = [row.value for row in feedback if row.kind == "thumb"]
    told: dict[str, Any] = {
        "feedback": rate(min(len(about), answers), answers),
        "thumbs": rate(sum(thumbs), len(thumbs)) | {"better": "higher"},
        "opinions": {kind: sum(row.kind == kind for row in feedback) for kind in KINDS},
        "metrics": {},
    }
    for rating in ratings:
        values = [row.value for row in feedback if row.kind == f"metrics.{rating.name}"]
        boolean = rating.kind == "boolean"
        found = rate(sum(values), len(values)) if boolean else mean(values)
        told["metrics"][rating.name] = found | {
            "better": rating.better, "level": rating.level, "kind": rating.kind,
            "scale": [rating.low, rating.high],
        }  # fmt: skip
    return told


def series(
    period: Period, judges: Sequence[Judge], edges: np.ndarray, wide: np.ndarray
) -> dict[str, Any]:
    """The same over time: values of the parts between ``edges``, rates of those between ``wide`` as
    [value, low, high]; None: no answer.
    """
    answers, minutes = period.answers, float(edges[1] - edges[0]) / 60
    good = answers.where(answers["status"] == OK)
    cuts = np.searchsorted(good["at"], edges)
    told: dict[str, Any] = {"per_minute": [float(n) / minutes for n in np.diff(cuts)]}
    for name, column, at in (
        ("first_token", "first_token_seconds", 0.5),
        ("first_token_high", "first_token_seconds", 0.95),
        ("whole", "seconds", 0.5),
        ("whole_high", "seconds", 0.95),
    ):
        values = good[column]
        told[name] = [_quantile(values[a:b], at) for a, b in pairwise(cuts)]
    told["errors"] = _rates(answers["at"], answers["status"] >= 500, wide)
    for judge in judges:
        mine = good[f"{judge.kind}_judge"] == judge.id
        told[judge.kind] = _rates(good["at"][mine], good[judge.kind][mine] >= judge.threshold, wide)
    thumbs = sorted((row.at, row.value) for row in period.feedback if row.kind == "thumb")
    at, ups = np.array(thumbs).reshape(-1, 2).T
    told["thumbs"] = _rates(at, ups, wide)
    return told


def _rates(at: np.ndarray, hits: np.ndarray, edges: np.ndarray) -> list[list[float] | None]:
    """The rate of ``hits`` in each part between ``edges``; ``at`` is sorted."""
    cuts, sums = np.searchsorted(at, edges), np.concatenate([[0], np.cumsum(hits)])
    return [_rate(float(sums[b] - sums[a]), int(b - a)) for a, b in pairwise(cuts)]


def lengths(answers: Answers) -> dict[str, list[int]]:
    """How many prompts and answers there are between `LENGTHS`."""
    good = answers.where(answers["status"] == OK)
    told = {}
    for name in ("prompt_tokens", "new_tokens"):
        values = good[name][~np.isnan(good[name])]
        told[name] = np.bincount(
            np.searchsorted(LENGTHS, values, side="right"), minlength=len(LENGTHS) + 1
        ).tolist()
    return told


def _length(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    return quantiles(known, (0.5, 0.95)) | {"mean": float(known.mean()) if len(known) else None}


def _quantile(values: np.ndarray, at: float) -> float | None:
    return quantiles(values, (at,))[f"p{at * 100:g}"]


def _rate(hits: float, n: int) -> list[float] | None:
    """[value, low, high]"""
    found = rate(hits, n)
    return [found["value"], found["low"], found["high"]] if n else None
