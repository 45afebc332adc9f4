"""How far raters agree: Krippendorff's alpha."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fastlm.errors import InputError

METRICS = ("nominal", "ordinal", "interval", "ratio")


def krippendorff_alpha(
    values: ArrayLike, metric: Literal["nominal", "ordinal", "interval", "ratio"] = "ordinal"
) -> float:
    """``1 - observed / expected`` disagreement: 1 is agreement, 0 is what chance gives, below 0
    raters contradict each other (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Disagreement is the mean of ``metric`` squared over pairs of values: observed within a unit,
    expected over all units. A unit with m values has weight 1 / (m - 1) per pair; one with fewer
    than two does not count.

    Args:
        values: (raters, units) floats, NaN where a rater has no value.
        metric: "nominal": 1 if the values differ; "ordinal": how many values lie between, each end
            counted half; "interval": a - b; "ratio": (a - b) / (a + b), for values >= 0.

    Returns NaN where no unit has two values, or all values are equal: expected is 0 then.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise InputError(f"values: wanted (raters, units), got shape {values.shape}")
    if np.isinf(values).any():
        raise InputError("values: wanted finite numbers, or NaN for none, got infinity")
    if metric not in METRICS:
        raise InputError(f"metric: wanted one of {', '.join(METRICS)}, got {metric!r}")
    values = values[:, (~np.isnan(values)).sum(0) >= 2]
    given = ~np.isnan(values)
    if not given.any():
        return float("nan")
    levels, index = np.unique(values[given], return_inverse=True)
    if metric == "ratio" and levels[0] < 0:
        raise InputError(f"values: wanted numbers >= 0 for the ratio metric, got {levels[0]}")
    counts = np.zeros((values.shape[1], len(levels)))  # per unit, how often each level was given
    np.add.at(counts, (np.nonzero(given)[1], index), 1)
    weights = 1 / (counts.sum(1) - 1)
    coincidences = (counts * weights[:, None]).T @ counts
    coincidences -= np.diag(counts.T @ weights)  # a value is no pair with itself
    totals = coincidences.sum(1)
    differences = _differences(levels, totals, metric)
    expected = totals @ differences @ totals
    if expected == 0:
        return float("nan")
    return float(1 - (totals.sum() - 1) * (coincidences * differences).sum() / expected)


def _differences(levels: np.ndarray, totals: np.ndarray, metric: str) -> np.ndarray:
    """The squared metric between each two levels, which are sorted."""
    a, b = levels[:, None], levels[None]
    if metric == "nominal":
        return (a != b).astype(np.float64)
    if metric == "ordinal":
        middle = np.cumsum(totals) - totals / 2  # half of the own values lie below
        return (middle[:, None] - middle) ** 2
    if metric == "interval":
        return (a - b) ** 2
    total = a + b
    return np.divide(a - b, total, out=np.zeros_like(total), where=total != 0) ** 2


def same_order(a: Sequence[float], b: Sequence[float]) -> tuple[int, int]:
    """Of the pairs of answers in two rankings of the same answers: (how many have the same order or
    are tied in both, how many there are).
    """
    first, second = (np.sign(np.subtract.outer(x, x)) for x in (a, b))
    upper = np.triu_indices(len(a), 1)
    return int((first[upper] == second[upper]).sum()), len(upper[0])
