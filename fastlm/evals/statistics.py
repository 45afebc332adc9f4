"""What an evaluation's numbers are worth: standard errors, intervals, and two models compared.

Scores are one number an item: 0 or 1 (right or wrong), a share, or bits per byte. Items are taken
as drawn from a larger set of such items (Miller 2024, arXiv:2411.00640); items that share a passage
are not drawn one by one, so their passage is passed in ``clusters``.

Two models are compared on the same items. Their scores go up and down together, so that the error
of the difference is smaller than that of either score, often by half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from fastlm.errors import InputError

FLIPS = 9999  # of signs: the smallest p-value is 1e-4, its error at 0.05 is 0.002
ENUMERATED = 13  # differences whose 2^13 signs are all tried: fewer than FLIPS
NORMAL = 5000  # differences from which on their sum is normal; flips would draw 50 million signs
CELLS = 2**22  # signs drawn at once: 32 MB
SERIES = 100  # degrees of freedom from which on Student's quantile is an expansion


@dataclass(frozen=True)
class Interval:
    """``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """``error`` is the standard error of ``mean``; infinite for one item (or one cluster)."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """The scores of a minus those of b on the same items.

    low, high: interval of the difference at ``confidence``.
    p: probability of a difference at least as large if the models were equally good.
    correlation: of the two models' scores; None where a model has the same score on all items.
    sd: of the difference per item, so that the error is sd / sqrt(n). With clusters it holds what
        they add.
    detectable: the smallest true difference that these items find with a power of 0.8.
    needed: items that find a true difference of this size with a power of 0.8; None if it is 0.
    test: "mcnemar", "sign flips" or "normal".
    """

    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float
    correlation: float | None
    sd: float
    detectable: float
    needed: int | None
    confidence: float
    test: str


def mean_error(values: Any, *, clusters: Sequence[Any] | None = None) -> Mean:
    """Return the mean of ``values`` (n,) and its standard error.

    Without clusters the error is sd / sqrt(n). With ``clusters`` (n names) it is

        sqrt(G / (G - 1) * sum over clusters of (sum of (value - mean))^2) / n

    for G clusters (Miller 2024, section 2.2); the factor G / (G - 1) makes clusters of one item
    the case without.
    """
    values = _scores("values", values)
    n = len(values)
    sums = _cluster_sums(values - values.mean(), clusters)
    groups = len(sums)
    error = math.inf
    if groups > 1:
        error = math.sqrt(groups / (groups - 1) * float(sums @ sums)) / n
    return Mean(float(values.mean()), error, n)


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a rate (1927): good for small n and rates near 0 or 1."""
    _between("successes", successes, 0, n)
    _at_least("n", n, 1)
    z = _z(confidence)
    rate, shrink = successes / n, 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    return Interval(low, 1.0 if successes == n else min(1.0, middle + half))


def rate_sd(p: float) -> float:
    """Return the standard deviation of scores that are 1 with probability ``p``, else 0."""
    _between("p", p, 0, 1)
    return math.sqrt(p * (1 - p))


def difference_sd(sd_a: float, sd_b: float, correlation: float = 0.0) -> float:
    """Return the sd of a difference per item. Correlation 0: the models saw different items."""
    _between("correlation", correlation, -1, 1)
    return math.sqrt(max(0.0, sd_a**2 + sd_b**2 - 2 * correlation * sd_a * sd_b))


def detectable(n: int, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest difference that ``n`` items detect: (z_alpha/2 + z_power) sd / sqrt(n).

    ``sd`` is that of the difference per item (`difference_sd`, or `Comparison.sd`). Against a fixed
    number such as chance it is that of the score (`rate_sd`).
    """
    _at_least("n", n, 1)
    return _reach(alpha, power) * sd / math.sqrt(n)


def items_needed(difference: float, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return how many items detect ``difference``: the inverse of `detectable`, at least 1."""
    if difference == 0:
        raise InputError("difference: wanted a number other than 0, got 0")
    return max(1, math.ceil((_reach(alpha, power) * sd / difference) ** 2))


def compare(
    a: Any,
    b: Any,
    *,
    clusters: Sequence[Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two models' scores (n,), (n,) on the same items, in the same order.

    The p-value, two-sided:

    - Scores 0 and 1 without clusters: McNemar's mid-p test on the items that only one model got
      right. It is discrete. The mid-p value has mean 1/2 and is as near to uniform as steps permit;
      with few such items (below 20) it is conservative: it rejects less often than it says. It can
      exceed alpha slightly, which Fagerland, Lydersen and Laake (2013) never saw in practice.
    - All else: flips of the signs of the differences (of the clusters' sums with ``clusters``).
      Under the null that differences are symmetric about 0 it is exact, and uniform up to steps of
      1 / (FLIPS + 1). Where they only have mean 0 it holds for large n. Up to 13 differences all
      signs are tried, in steps of 2^(1 - n); ties (many equal differences) make it conservative.
    - From 5,000 differences on: the normal distribution of their sum.

    ``seed`` draws the flips. Swapping a and b changes the signs of difference, low and high and
    nothing else. The interval of 0/1 scores is that of Bonett and Price (2012); otherwise it is
    Student's, with as many degrees of freedom as there are clusters less one. Test and interval are
    not the same calculation, so that in rare cases one excludes 0 and the other does not.
    """
    a, b = _scores("a", a), _scores("b", b)
    if len(a) != len(b):
        raise InputError(f"b: wanted {len(a)} scores as in a, got {len(b)}")
    n, d = len(a), a - b
    difference = float(d.mean())
    sums = _cluster_sums(d, clusters)
    error = mean_error(d, clusters=clusters).error
    binary = clusters is None and bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    if binary:
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        p, test = _mcnemar(wins, losses), "mcnemar"
        low, high = _bonett_price(wins, losses, n, confidence)
    else:
        p, test = _sign_flips(sums, seed)
        half = _student(confidence, len(sums) - 1) * error if error else 0.0
        low, high = difference - half, difference + half
    sd = error * math.sqrt(n)
    varied = n > 1 and a.std() > 0 and b.std() > 0
    alpha = 1 - confidence
    return Comparison(
        n=n,
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=difference,
        low=low,
        high=high,
        p=p,
        correlation=float(np.corrcoef(a, b)[0, 1]) if varied else None,
        sd=sd,
        detectable=detectable(n, sd, alpha=alpha),
        needed=items_needed(difference, sd, alpha=alpha)
        if difference and math.isfinite(sd)
        else None,
        confidence=confidence,
        test=test,
    )


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given.

    The chance that any of the adjusted values of true nulls is below alpha is at most alpha,
    however the tests depend on each other.
    """
    for p in pvalues:
        _between("p", p, 0, 1)
    adjusted, least = [0.0] * len(pvalues), 0.0
    order = sorted(range(len(pvalues)), key=pvalues.__getitem__)
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = least
    return adjusted


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of ``k`` answers passes, from ``c`` of ``n`` answers that passed.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374).
    """
    _at_least("n", n, 1)
    _between("c", c, 0, n)
    _between("k", k, 1, n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Corrected:
    """``rate`` corrected for the judge's errors, with its interval ``low`` to ``high``."""

    rate: float
    low: float
    high: float


def rogan_gladen(
    rate: float,
    n: int,
    *,
    sensitivity: tuple[int, int],
    specificity: tuple[int, int],
    confidence: float = 0.95,
) -> Corrected:
    """Correct the ``rate`` of ``n`` items that a judge flagged for the judge's own errors.

        (rate + specificity - 1) / (sensitivity + specificity - 1)        Rogan and Gladen 1978

    ``sensitivity`` is (flagged, all) of labelled items that should be flagged, ``specificity``
    (passed, all) of those that should not. The interval holds the error of all three rates (Lang
    and Reiczigel 2014, doi:10.1016/j.prevetmed.2013.09.015); both are clipped to [0, 1]. Unlike
    theirs, the adjusted rate is clipped before its error is taken, so that no interval is a point.

    InputError: a judge that is no better than chance, from which no rate follows.
    """
    _between("rate", rate, 0, 1)
    _at_least("n", n, 1)
    for name, (right, total) in (("sensitivity", sensitivity), ("specificity", specificity)):
        _at_least(f"{name} items", total, 1)
        _between(name, right, 0, total)
    (tp, positives), (tn, negatives) = sensitivity, specificity
    gain = tp / positives + tn / negatives - 1
    if gain <= 0:
        raise InputError(
            "judge: wanted sensitivity + specificity above 1, got"
            f" {tp}/{positives} + {tn}/{negatives} = {gain + 1:.3f}"
        )
    point = min(1.0, max(0.0, (rate + tn / negatives - 1) / gain))
    z = _z(confidence)
    seen = (n * rate + z * z / 2) / (n + z * z)
    se, sp = (tp + 1) / (positives + 2), (tn + 1) / (negatives + 2)
    var_se, var_sp = se * (1 - se) / (positives + 2), sp * (1 - sp) / (negatives + 2)
    gain = se + sp - 1
    if gain <= 0:  # a judge better than chance on so few items that it says nothing
        return Corrected(point, 0.0, 1.0)
    true = min(1.0, max(0.0, (seen + sp - 1) / gain))
    shift = 2 * z * z * (true * var_se - (1 - true) * var_sp)
    variance = seen * (1 - seen) / (n + z * z) + true**2 * var_se + (1 - true) ** 2 * var_sp
    half = z * math.sqrt(variance) / gain
    low, high = (min(1.0, max(0.0, true + shift + side)) for side in (-half, half))
    return Corrected(point, min(low, point), max(high, point))


def _mcnemar(wins: int, losses: int) -> float:
    """Two-sided mid-p of Binomial(wins + losses, 1/2)."""
    total, least = wins + losses, min(wins, losses)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        for k in range(least + 1)
    ]
    terms = [math.exp(value - total * math.log(2)) for value in logs]
    return min(1.0, 2 * (math.fsum(terms) - terms[-1] / 2))


def _bonett_price(wins: int, losses: int, n: int, confidence: float) -> tuple[float, float]:
    won, lost = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = _z(confidence) * math.sqrt((won + lost - (won - lost) ** 2) / (n + 2))
    return max(-1.0, won - lost - half), min(1.0, won - lost + half)


def _sign_flips(d: np.ndarray, seed: int) -> tuple[float, str]:
    """Return how often the sum of ``d`` with random signs is as far from 0 as it is, and the test.

    Zeros do not change any sum.
    """
    d = d[d != 0]
    count, reached = len(d), abs(float(d.sum()))
    if count >= NORMAL:
        return math.erfc(reached / math.sqrt(2 * float(d @ d))), "normal"
    reached -= 1e-9 * float(np.abs(d).sum())  # sums in another order round differently
    if count <= ENUMERATED:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float((np.abs(d.sum() - 2 * (bits @ d)) >= reached).mean()), "sign flips"
    rng, far, left = np.random.default_rng(seed), 0, FLIPS
    while left:
        rows = min(left, max(1, CELLS // count))
        bits = np.unpackbits(rng.integers(0, 256, (rows, (count + 7) // 8), np.uint8), axis=1)
        far += int((np.abs(d.sum() - 2 * (bits[:, :count] @ d)) >= reached).sum())
        left -= rows
    return (1 + far) / (1 + FLIPS), "sign flips"


def _scores(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name}: wanted a list of scores, got shape {array.shape}")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"{name}: wanted finite scores, got {array[where]} at {where}")
    return array


def _cluster_sums(values: np.ndarray, clusters: Sequence[Any] | None) -> np.ndarray:
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise InputError(f"clusters: wanted {len(values)} names, got {len(clusters)}")
    indices: dict[Any, int] = {}
    members = [indices.setdefault(cluster, len(indices)) for cluster in clusters]
    return np.bincount(members, weights=values)


def _student(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's distribution; infinite for 0 degrees of freedom.

    Finite sums (Abramowitz and Stegun 26.7.3, 26.7.4), or Cornish and Fisher's expansion (26.7.5).
    """
    z = _z(confidence)
    if freedom == 0:
        return math.inf
    if freedom >= SERIES:
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)

    def inside(angle: float) -> float:  # probability of |t| < sqrt(freedom) tan(angle)
        odd = freedom % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for step in range(freedom // 2):
            total += term
            ratio = (2 * step + 1 + odd) / (2 * step + 2 + odd)
            term *= ratio * math.cos(angle) ** 2
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _z(confidence: float) -> float:
    """Two-sided quantile of the normal distribution."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence: wanted a number between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _reach(alpha: float, power: float) -> float:
    if not 0 < power < 1:
        raise InputError(f"power: wanted a number between 0 and 1, got {power}")
    return _z(1 - alpha) + NormalDist().inv_cdf(power)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name}: wanted {low} to {high}, got {value}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}: wanted {least} or more, got {value}")
