"""Rates and means with their 95 % intervals."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastlm.stats.intervals import Interval, wilson

Z = 1.959964  # of 95 %


def rate(hits: float, n: int) -> dict[str, Any]:
    """A rate with what it is of, and Wilson's interval; ``value`` is None where n is 0."""
    known = wilson(hits, n) if n else Interval(0.0, 1.0)
    return {
        "n": n, "hits": hits, "value": hits / n if n else None, "low": known.low,
        "high": known.high,
    }  # fmt: skip


def mean(values: Iterable[float]) -> dict[str, Any]:
    """A mean with its interval, by the normal distribution; None below two values."""
    found = np.asarray(list(values), float)
    n = len(found)
    value = float(found.mean()) if n else None
    low = high = None
    if value is not None and n > 1:
        half = Z * float(found.std(ddof=1)) / math.sqrt(n)
        low, high = value - half, value + half
    return {"n": n, "value": value, "low": low, "high": high}


def quantiles(values: np.ndarray, at: Iterable[float] = (0.5, 0.95, 0.99)) -> dict[str, Any]:
    """p50, p95, ... of those that are not NaN; None where there is none."""
    found = values[~np.isnan(values)]
    told: dict[str, Any] = {"n": len(found)}
    for q in at:
        told[f"p{q * 100:g}"] = float(np.quantile(found, q)) if len(found) else None
    return told
