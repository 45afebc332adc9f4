"""How far raters agree: Krippendorff's alpha, and pairs of answers in the same order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


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
    """``alpha``: Krippendorff's ordinal alpha (2011, "Computing Krippendorff's Alpha-Reliability"):
    1 is agreement, 0 is what chance gives, below 0 raters contradict each other; NaN where it is
    undefined. ``items``: how many have two raters or more. ``pairs``: of each two raters with an
    item in common.
    """

    alpha: float
    items: int
    pairs: list[PairAgreement]


def agreement_of(rankings: Iterable[Mapping[str, Sequence[int]]]) -> Agreement:
    """Return the agreement on items. ``rankings``: per item, the ranks of its answers by rater.

    The units of alpha are answers. A value is the answer's place from 0 (best) to 1 (worst), so
    that items with different numbers of answers compare; tied answers share their mean place.
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
    alpha = math.nan  # also where all places are equal
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
