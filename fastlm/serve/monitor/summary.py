"""Summarise a period, of all answers or of one model's, for the dashboard and for alerts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastlm.serve.monitor.answer_judges import Judge
from fastlm.serve.monitor.window import FeedbackRow, Period
from fastlm.serve.ratings import Rating
from fastlm.stats.summaries import mean, quantiles, rate

OK = 200
KINDS = ("comment", "corrected", "picked")
LENGTH_EDGES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens
# metrics of alerts, in addition to the numbers that people give
RATES = (
    "refusal", "toxicity", "errors", "rejected", "disconnected", "truncated", "feedback", "thumbs",
)  # fmt: skip
VALUES = (
    "per_minute", "queue_p95", "first_token_p50", "first_token_p95", "latency_p50", "latency_p95",
    "prompt_tokens_mean", "new_tokens_mean", "drift_psi", "drift_p",
)  # fmt: skip


def summary(period: Period, ratings: Sequence[Rating], judges: Sequence[Judge]) -> dict[str, Any]:
    """Return the summary of a period."""
    answers, minutes = period.answers, period.minutes
    status = answers["status"]
    good = answers[status == OK]
    return {
        "requests": len(answers),
        "answers": len(good),
        "per_minute": len(good) / minutes if minutes > 0 else 0.0,
        "errors": _rate(status >= 500),
        "rejected": _rate(status == 429),
        "disconnected": _rate(status == 499),
        "truncated": _rate(good["finish_reason"] == "length"),
        "queue": quantiles(good["queue_seconds"]),
        "first_token": quantiles(good["first_token_seconds"]),
        "latency": quantiles(good["seconds"]),
        "prompt_tokens": _length(good["prompt_tokens"]),
        "new_tokens": _length(good["new_tokens"]),
        **{judge.kind: judge_rate(good, judge) for judge in judges},
        **feedback_summary(len(good), period.feedback, ratings),
    }


def value_of(metric: str, summary: Mapping[str, Any], drift: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric of a `summary` (or of `prompt_drift.drift`), with its interval if it has
    one, and the number of answers behind it.
    """
    keys = ("value", "low", "high", "n")
    none: dict[str, Any] = {"value": None, "low": None, "high": None, "n": 0}
    if metric in RATES or metric in summary.get("metrics", {}):
        value = summary["metrics"].get(metric) or summary[metric]
        return {key: value[key] for key in keys}
    if metric == "per_minute":  # without answers it has a value, too
        return none | {"value": summary["per_minute"], "n": 10_000}
    if metric.startswith("drift"):
        if not drift.get("enough_prompts"):
            return none
        value = drift["mmd"]["p"]
        if metric == "drift_psi":
            value = max(feature["psi"] for feature in drift["features"])
        return none | {"value": value, "n": drift["prompts"]}
    name, _, part = metric.rpartition("_")
    return none | {"value": summary[name][part], "n": summary[name]["n"]}


def _rate(hits: np.ndarray) -> dict[str, Any]:
    return rate(int(hits.sum()), len(hits))


def judge_rate(good: np.ndarray, judge: Judge) -> dict[str, Any]:
    """Return the rate of a judge, with its name, and the number of answers with another judge."""
    scores, ids = good[judge.kind], good[f"{judge.kind}_judge"]
    has_judge = ids == judge.id
    others = int((~has_judge & (ids != "")).sum())
    metadata = {"judge": judge.id, "method": judge.method, "other_judges": others}
    return _rate(scores[has_judge] >= judge.threshold) | metadata


def feedback_summary(
    answers: int, feedback: Sequence[FeedbackRow], ratings: Sequence[Rating]
) -> dict[str, Any]:
    """Return the share of ``answers`` with feedback, the thumbs, and each declared number."""
    keys = {row.key for row in feedback if row.key[1] >= 0 and row.model}
    thumbs = [row.value for row in feedback if row.kind == "thumb"]
    result: dict[str, Any] = {
        "feedback": rate(min(len(keys), answers), answers),
        "thumbs": rate(sum(thumbs), len(thumbs)) | {"better": "higher"},
        "feedback_counts": {kind: sum(row.kind == kind for row in feedback) for kind in KINDS},
        "metrics": {},
    }
    for rating in ratings:
        values = [row.value for row in feedback if row.kind == f"metrics.{rating.name}"]
        boolean = rating.kind == "boolean"
        value = rate(sum(values), len(values)) if boolean else mean(values)
        result["metrics"][rating.name] = value | {
            "better": rating.better, "level": rating.level, "kind": rating.kind,
            "scale": [rating.low, rating.high],
        }  # fmt: skip
    return result


def series(
    period: Period, judges: Sequence[Judge], edges: np.ndarray, rate_edges: np.ndarray
) -> dict[str, Any]:
    """Return the values over time: values between ``edges``, and rates between ``rate_edges`` as
    [value, low, high], or None without an answer.
    """
    answers, minutes = period.answers, float(edges[1] - edges[0]) / 60
    good = answers[answers["status"] == OK]
    bounds = np.searchsorted(good["at"], edges)
    values: dict[str, Any] = {"per_minute": [float(n) / minutes for n in np.diff(bounds)]}
    for name, column in (("first_token", "first_token_seconds"), ("latency", "seconds")):
        parts = [quantiles(good[column][a:b], (0.5, 0.95)) for a, b in pairwise(bounds)]
        values[f"{name}_p50"] = [part["p50"] for part in parts]
        values[f"{name}_p95"] = [part["p95"] for part in parts]
    values["errors"] = _rates(answers["at"], answers["status"] >= 500, rate_edges)
    for judge in judges:
        scored = good[good[f"{judge.kind}_judge"] == judge.id]
        hits = scored[judge.kind] >= judge.threshold
        values[judge.kind] = _rates(scored["at"], hits, rate_edges)
    thumbs = sorted((row.at, row.value) for row in period.feedback if row.kind == "thumb")
    at, ups = np.array(thumbs).reshape(-1, 2).T
    values["thumbs"] = _rates(at, ups, rate_edges)
    return values


def _rates(at: np.ndarray, hits: np.ndarray, edges: np.ndarray) -> list[list[float] | None]:
    """Return the rate of ``hits`` in each part between ``edges``; ``at`` is sorted."""
    parts = [_rate(hits[a:b]) for a, b in pairwise(np.searchsorted(at, edges))]
    return [[p["value"], p["low"], p["high"]] if p["n"] else None for p in parts]


def lengths(answers: np.ndarray) -> dict[str, list[int]]:
    """Return the numbers of prompts and of answers between `LENGTH_EDGES`."""
    good, counts = answers[answers["status"] == OK], {}
    for name in ("prompt_tokens", "new_tokens"):
        bars = np.searchsorted(LENGTH_EDGES, good[name][~np.isnan(good[name])], side="right")
        counts[name] = np.bincount(bars, minlength=len(LENGTH_EDGES) + 1).tolist()
    return counts


def _length(values: np.ndarray) -> dict[str, Any]:
    finite = values[~np.isnan(values)]
    mean_length = float(finite.mean()) if len(finite) else None
    return quantiles(finite, (0.5, 0.95)) | {"mean": mean_length}
