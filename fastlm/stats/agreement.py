"""How far raters agree: Krippendorff's alpha, and pairs of answers in the same order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
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


@dataclass(frozen=True)
class PairAgreement:
    """Two raters: how many items both ranked; how many pairs of answers those have, and how many
    of them both put in the same order (or both tied).
    """

    raters: tuple[str, str]
    items: int
    alike: int
    pairs: int


@dataclass(frozen=True)
class Agreement:
    """``alpha``: Krippendorff's ordinal alpha, NaN where it is undefined. ``items``: how many have
    two raters or more. ``pairs``: of each two raters with an item in common.
    """

    alpha: float
    items: int
    pairs: list[PairAgreement]


def agreement_of(rankings: Iterable[Mapping[str, Sequence[int]]]) -> Agreement:
    """The agreement on items. ``rankings``: per item, the ranks of its answers by each rater.

    The units of alpha are answers. A value is the answer's place from 0 (best) to 1 (worst), so
    that items with different numbers of answers compare; tied answers share their mean place.
    """
    shared = [item for item in rankings if len(item) > 1]
    raters = sorted({rater for item in shared for rater in item})
    nobody = float("nan")
    places = [{rater: _places(ranks) for rater, ranks in item.items()} for item in shared]
    units = [
        [item[rater][i] if rater in item else nobody for rater in raters]
        for item in places
        for i in range(len(next(iter(item.values()))))
    ]
    alpha = krippendorff_alpha(np.transpose(units)) if units else nobody
    pairs = []
    for a, b in combinations(raters, 2):
        both = [(item[a], item[b]) for item in shared if a in item and b in item]
        if both:
            alike, total = map(sum, zip(*(_same_order(*ranks) for ranks in both)))
            pairs.append(PairAgreement((a, b), len(both), alike, total))
    return Agreement(alpha, len(shared), pairs)


def _places(ranks: Sequence[int]) -> list[float]:
    below = [sum(other < rank for other in ranks) for rank in ranks]
    tied = [ranks.count(rank) - 1 for rank in ranks]
    return [(b + t / 2) / (len(ranks) - 1) for b, t in zip(below, tied)]


def _same_order(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    first, second = (np.sign(np.subtract.outer(ranks, ranks)) for ranks in (a, b))
    upper = np.triu_indices(len(a), 1)
    return int((first[upper] == second[upper]).sum()), len(upper[0])
