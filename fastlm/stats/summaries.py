"""Rates, means and quantiles as JSON objects, with 95 % intervals."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastlm.stats.intervals import Interval, mean_error, wilson

UNKNOWN = {"low": None, "high": None}


def rate(hits: float, n: int) -> dict[str, Any]:
    """Return a rate with its counts and Wilson's interval; ``value`` is None if n is 0."""
    interval = wilson(hits, n) if n else Interval(0.0, 1.0)
    value = hits / n if n else None
    return {"n": n, "hits": hits, "value": value, "low": interval.low, "high": interval.high}


def mean(values: Iterable[float]) -> dict[str, Any]:
    """Return a mean with its interval (`fastlm.stats.intervals.Mean`); None below two values."""
    numbers = list(values)
    if len(numbers) < 2:
        return {"n": len(numbers), "value": math.fsum(numbers) if numbers else None, **UNKNOWN}
    result = mean_error(numbers)
    interval = result.interval()
    return {"n": result.n, "value": result.mean, "low": interval.low, "high": interval.high}


def quantiles(values: np.ndarray, at: Iterable[float] = (0.5, 0.95, 0.99)) -> dict[str, Any]:
    """Return p50, p95, ... of the values that are not NaN; None if there are none."""
    numbers = values[~np.isnan(values)]
    return {"n": len(numbers)} | {
        f"p{q * 100:g}": float(np.quantile(numbers, q)) if len(numbers) else None for q in at
    }
