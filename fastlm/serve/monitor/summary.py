"""A period in numbers: of all answers, or of a model's. Both the dashboard and alerts read them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastlm.serve.monitor.judges import Judge
from fastlm.serve.monitor.window import FeedbackRow, Period
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
    good = answers[status == OK]
    return {
        "requests": len(answers),
        "answers": len(good),
        "per_minute": len(good) / minutes if minutes > 0 else 0.0,
        "errors": _share(status >= 500),
        "refused": _share(status == 429),
        "left": _share(status == 499),
        "cut": _share(good["finish_reason"] == "length"),
        "queue": quantiles(good["queue_seconds"]),
        "first_token": quantiles(good["first_token_seconds"]),
        "whole": quantiles(good["seconds"]),
        "prompt_tokens": _length(good["prompt_tokens"]),
        "new_tokens": _length(good["new_tokens"]),
        **{judge.kind: judged(good, judge) for judge in judges},
        **feedback_summary(len(good), period.feedback, ratings),
    }


def value_of(metric: str, told: Mapping[str, Any], drift: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric of a `summary` (or of `prompts_drift.drift`) with its interval where it has
    one, and how many answers it is of.
    """
    keys = ("value", "low", "high", "n")
    none: dict[str, Any] = {"value": None, "low": None, "high": None, "n": 0}
    if metric in RATES or metric in told.get("metrics", {}):
        found = told["metrics"].get(metric) or told[metric]
        return {key: found[key] for key in keys}
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


def _share(hits: np.ndarray) -> dict[str, Any]:
    return rate(int(hits.sum()), len(hits))


def judged(good: np.ndarray, judge: Judge) -> dict[str, Any]:
    """The rate of a judge, with its name, and how many answers another one judged."""
    scores, ids = good[judge.kind], good[f"{judge.kind}_judge"]
    mine = ids == judge.id
    others = int((~mine & (ids != "")).sum())
    about = {"judge": judge.id, "method": judge.method, "other_judges": others}
    return _share(scores[mine] >= judge.threshold) | about


def feedback_summary(
    answers: int, feedback: Sequence[FeedbackRow], ratings: Sequence[Rating]
) -> dict[str, Any]:
    """Feedback: the share of ``answers`` that have some, thumbs, and each declared number."""
    about = {row.key for row in feedback if row.key[1] >= 0 and row.model}
    thumbs = [row.value for row in feedback if row.kind == "thumb"]
    told: dict[str, Any] = {
        "feedback": rate(min(len(about), answers), answers),
        "thumbs": rate(sum(thumbs), len(thumbs)) | {"better": "higher"},
        "feedback_counts": {kind: sum(row.kind == kind for row in feedback) for kind in KINDS},
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
    good = answers[answers["status"] == OK]
    cuts = np.searchsorted(good["at"], edges)
    told: dict[str, Any] = {"per_minute": [float(n) / minutes for n in np.diff(cuts)]}
    for name, column in (("first_token", "first_token_seconds"), ("whole", "seconds")):
        parts = [quantiles(good[column][a:b], (0.5, 0.95)) for a, b in pairwise(cuts)]
        told[name] = [part["p50"] for part in parts]
        told[f"{name}_high"] = [part["p95"] for part in parts]
    told["errors"] = _rates(answers["at"], answers["status"] >= 500, wide)
    for judge in judges:
        mine = good[good[f"{judge.kind}_judge"] == judge.id]
        told[judge.kind] = _rates(mine["at"], mine[judge.kind] >= judge.threshold, wide)
    thumbs = sorted((row.at, row.value) for row in period.feedback if row.kind == "thumb")
    at, ups = np.array(thumbs).reshape(-1, 2).T
    told["thumbs"] = _rates(at, ups, wide)
    return told


def _rates(at: np.ndarray, hits: np.ndarray, edges: np.ndarray) -> list[list[float] | None]:
    """The rate of ``hits`` in each part between ``edges``; ``at`` is sorted."""
    parts = [_share(hits[a:b]) for a, b in pairwise(np.searchsorted(at, edges))]
    return [[p["value"], p["low"], p["high"]] if p["n"] else None for p in parts]


def lengths(answers: np.ndarray) -> dict[str, list[int]]:
    """How many prompts and answers there are between `LENGTHS`."""
    good, told = answers[answers["status"] == OK], {}
    for name in ("prompt_tokens", "new_tokens"):
        bars = np.searchsorted(LENGTHS, good[name][~np.isnan(good[name])], side="right")
        told[name] = np.bincount(bars, minlength=len(LENGTHS) + 1).tolist()
    return told


def _length(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    return quantiles(known, (0.5, 0.95)) | {"mean": float(known.mean()) if len(known) else None}
