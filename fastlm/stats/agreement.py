"""Agreement of raters: Krippendorff's alpha, the share of pairs in the same order, and Cohen's
kappa."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fastlm.stats.intervals import Interval, normal_quantile


@dataclass(frozen=True)
class PairAgreement:
    """The agreement of two raters.

    items: number of items that both ranked.
    alike: pairs of answers that both put in the same order (or both tied).
    pairs: pairs of answers of these items.
    """

    raters: tuple[str, str]
    items: int
    alike: int
    pairs: int


@dataclass(frozen=True)
class Agreement:
    """The agreement of all raters.

    alpha: Krippendorff's ordinal alpha (2011, "Computing Krippendorff's Alpha-Reliability"): 1 is
        full agreement, 0 is chance, below 0 raters contradict each other; NaN if undefined.
    items: number of items with two raters or more.
    pairs: the agreement of each two raters with a common item.
    """

    alpha: float
    items: int
    pairs: list[PairAgreement]


def agreement_of(rankings: Iterable[Mapping[str, Sequence[int]]]) -> Agreement:
    """Return the agreement on items. ``rankings``: per item, the ranks of its answers by rater.

    The units of alpha are answers. A value is the answer's relative rank from 0 (best) to 1
    (worst), so that items with different numbers of answers are comparable. Tied answers share
    their mean rank.
    """
    import krippendorff

    shared = [item for item in rankings if len(item) > 1]
    raters = sorted({rater for item in shared for rater in item})
    ranks_of = [{rater: _relative_ranks(ranks) for rater, ranks in item.items()} for item in shared]
    units = [
        [item[rater][i] if rater in item else math.nan for rater in raters]
        for item in ranks_of
        for i in range(len(next(iter(item.values()))))
    ]
    alpha = math.nan  # also if all ranks are equal
    if len({rank for unit in units for rank in unit if not math.isnan(rank)}) > 1:
        alpha = krippendorff.alpha(np.transpose(units), level_of_measurement="ordinal")
    pairs = []
    for a, b in combinations(raters, 2):
        both = [(item[a], item[b]) for item in shared if a in item and b in item]
        if both:
            alike, total = map(sum, zip(*(_count_same_order(*ranks) for ranks in both)))
            pairs.append(PairAgreement((a, b), len(both), alike, total))
    return Agreement(float(alpha), len(shared), pairs)


def _relative_ranks(ranks: Sequence[int]) -> list[float]:
    below = [sum(other < rank for other in ranks) for rank in ranks]
    tied = [ranks.count(rank) - 1 for rank in ranks]
    return [(b + t / 2) / (len(ranks) - 1) for b, t in zip(below, tied)]


def _count_same_order(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    first, second = (np.sign(np.subtract.outer(ranks, ranks)) for ranks in (a, b))
    upper = np.triu_indices(len(a), 1)
    return int((first[upper] == second[upper]).sum()), len(upper[0])


def cohen_kappa(
    table: Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, Interval]:
    """Return Cohen's kappa (1960) of two raters and its interval. ``table``: how often the first
    rater chose the row and the second the column.

    The error is that of Fleiss, Cohen and Everitt (1969, doi:10.1037/h0028106). It and the middle
    of the interval are those of the table with 1/2 added to each cell, so that full agreement on a
    few items is not certain. Two raters who always choose the same class have kappa 0.
    """
    counts = np.asarray(table, dtype=np.float64)
    kappa, _ = _kappa(counts)
    middle, error = _kappa(counts + 0.5)
    half = normal_quantile(confidence) * error
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return kappa, Interval(min(low, kappa), max(high, kappa))


def _kappa(counts: np.ndarray) -> tuple[float, float]:
    """Return kappa and its standard error."""
    n = counts.sum()
    p = counts / n
    rows, columns = p.sum(1), p.sum(0)
    agreed, chance = float(np.trace(p)), float(rows @ columns)
    if chance >= 1:
        return 0.0, 0.0
    kappa = (agreed - chance) / (1 - chance)
    same = np.diag(p) @ ((1 - chance) - (rows + columns) * (1 - agreed)) ** 2
    other = p * (columns[:, None] + rows[None, :]) ** 2
    different = (1 - agreed) ** 2 * (other.sum() - np.trace(other))
    rest = (agreed * chance - 2 * chance + agreed) ** 2
    variance = max(0.0, float(same + different - rest)) / (n * (1 - chance) ** 4)
    return kappa, math.sqrt(variance)
