"""Standard errors, intervals and paired comparisons of evaluation scores.

An item has one score: 0 or 1 (wrong or right), a share, or bits per byte. Items are assumed to be a
sample of a larger population (Miller 2024, arXiv:2411.00640). Items that share a passage are not
independent; their passages are passed as ``clusters``.

Two models are compared on the same items. Their scores are correlated, so the error of the
difference is smaller than that of either score, often by half.

The interval of a mean and the p-value of a difference are one calculation, in closed form
(`Mean`). It is Student's t with corrections for

- skewed scores, such as bits per byte: Hall's transformation (1992, Annals of Statistics 20)
  removes the skewness of t. For each end, the wider of Hall's and Student's is used;
- items in clusters of unequal size (a few documents with most of the items): the bias-reduced
  error CR2 and Satterthwaite's degrees of freedom (Bell and McCaffrey 2002; Imbens and Kolesar
  2016, doi:10.1162/REST_a_00552), for the estimated correlation within clusters.

Rejection rates of a true difference of 0 at a nominal 5 % (test_simulations.py: 2,000 draws each;
in brackets the sign-flip test, which assumes symmetry):

    n                                   10            20            50            200
    normal                         .03 (.05)     .04 (.05)     .05 (.05)     .05 (.05)
    heavy tails (Student's, 3)     .04 (.04)     .04 (.05)     .04 (.04)     .05 (.05)
    exponential                    .05 (.10)     .05 (.09)     .04 (.06)     .04 (.05)
    lognormal, sigma 1             .08 (.16)     .07 (.13)     .05 (.10)     .05 (.07)

    clusters with most of the items in a few (in brackets: factor G / (G - 1), G - 1 degrees)
    10 clusters, lognormal sizes   .01 to .04 (.13 to .34)
    30 clusters                    .01 to .04 (.07 to .24)

No test is valid for every distribution of mean 0: a hundred items rarely show a difference that
comes from one item in a thousand. With fewer than 10 items or clusters, or with cluster means as
skewed as a lognormal, up to .13 are rejected. Rejected alternatives, by the same simulations: the
bootstrap t (.06 for normal, .11 to .13 for lognormal differences at n = 10, and it needs random
numbers), Mammen's wild bootstrap (.08 and .21), Wilcoxon's ranks (they test symmetry, so skewness
alone causes more rejections as n grows).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from fastlm.errors import InputError
from fastlm.stats.power import (
    check_between,
    items_needed,
    mcnemar_items_needed,
    mcnemar_mde,
    mean_mde,
    quantile,
)

Z95 = NormalDist().inv_cdf(0.975)  # standard errors on each side of a 95 % interval of many items
MAX_COUNTED = 64  # samples: counting takes milliseconds
DRAWS = 4096  # of more samples
ROUNDING = 1e-12  # relative to the largest score: a smaller spread counts as 0


@dataclass(frozen=True)
class Interval:
    """An interval from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error.

    error: infinite for one item (or one cluster).
    df: degrees of freedom of the error.
    skewness: estimated skewness of the mean.
    """

    mean: float
    error: float
    n: int
    df: float
    skewness: float = 0.0

    def interval(self, confidence: float = 0.95) -> Interval:
        """Return the interval of the true mean: all means with a `p_value` above 1 - confidence.
        If all scores are equal it is a point, even where few items have a larger `p_value`."""
        normal_quantile(confidence)
        if not self.error:
            return Interval(self.mean, self.mean)
        if not math.isfinite(self.error):
            return Interval(-math.inf, math.inf)
        from scipy import special  # takes a third of a second; not needed when the server starts

        t = float(special.stdtrit(self.df, (1 + confidence) / 2))
        low, high = max(t, self._plain(t)), min(-t, self._plain(-t))
        return Interval(self.mean - low * self.error, self.mean - high * self.error)

    def p_value(self, null: float = 0.0) -> float:
        """Return the two-sided probability of a mean at least as far from ``null`` if ``null`` is
        the true mean. If all scores are equal, it is the probability of equal signs."""
        if not math.isfinite(self.error):
            return 1.0
        if not self.error:
            return 1.0 if self.mean == null else 2.0**-self.df
        from scipy import special

        t = (self.mean - null) / self.error
        min_t = min(abs(t), abs(self._unskewed(t)))
        return 2 * float(special.stdtr(self.df, -min_t))

    def _unskewed(self, t: float) -> float:
        k = self.skewness
        return t + k * t**2 / 3 + k**2 * t**3 / 27 + k / 6

    def _plain(self, t: float) -> float:
        """Return the inverse of `_unskewed`, which is ((1 + k t / 3)^3 - 1) / k + k / 6."""
        k = self.skewness
        if abs(k) < 1e-6:
            return t
        return 3 / k * (float(np.cbrt(1 + k * (t - k / 6))) - 1)


@dataclass(frozen=True)
class PairedComparison:
    """The scores of a minus those of b on the same items.

    low, high: interval of the difference at ``confidence``.
    p: probability of a difference at least as large if the models are equally good.
    correlation: of the two models' scores; None if a model has the same score on all items.
    sd: standard deviation of the difference per item; the error is sd / sqrt(n). It includes the
        effect of clusters.
    min_detectable_effect: minimum detectable effect at 80 % power; infinite if the differences
        give no estimate of their variance.
    items_needed: items that detect a true difference of this size at 80 % power; None if it is 0.
    test: "mcnemar" or "t".
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
    min_detectable_effect: float
    items_needed: int | None
    confidence: float
    test: str


def mean_error(values: Any, *, clusters: Sequence[Any] | None = None) -> Mean:
    """Return the mean of ``values`` (n,) with its standard error.

    Without clusters the error is sd / sqrt(n), with n - 1 degrees of freedom. With ``clusters`` (n
    names, of G clusters with n_g items each; e_g = mean of cluster - mean, w_g = n_g / n) it is CR2

        sqrt(sum over clusters of w_g^2 e_g^2 v_g / E[e_g^2])        v_g = icc + (1 - icc) / n_g

    v_g is the variance of a cluster's mean up to a factor, from the intraclass correlation of the
    values (one-way analysis of variance). E[e_g^2] is the resulting expectation, so that the
    squared error is unbiased. For clusters of equal size it is G / (G - 1) sum of w_g^2 e_g^2 with
    G - 1 degrees of freedom. If one cluster has most of the items, df is little more than 1.
    """
    values = _scores("values", values)
    n, mean = len(values), float(values.mean())
    sums, sizes = _clusters(values - mean, clusters)
    if len(sums) == 1:
        return Mean(mean, math.inf, n, 0.0)
    weights = sizes / n
    v = _spread_of_means(values - mean, sums, sizes)
    u = weights * v
    total = float(weights @ u)  # the variance of the mean
    scale = v / (v - 2 * u + total)
    parts = np.sqrt(scale) * sums / n
    squares = float(parts @ parts)
    # 2 E^2 / Var of the squared error, a quadratic form in the clusters' means, assumed normal
    d = scale * weights**2
    d_sum, first, second = d.sum(), d @ u, d @ u**2
    trace = d**2 @ (v**2 + 2 * v * (total - 2 * u)) + total**2 * d_sum**2
    trace += 2 * d_sum * second - 4 * total * d_sum * first + 2 * first**2
    df = total**2 / float(trace)
    if squares <= (ROUNDING * float(np.abs(values).max())) ** 2:
        return Mean(mean, 0.0, n, df)
    groups = len(sums)
    skewness = 0.0
    if groups > 2:
        unbiased = math.sqrt(groups * (groups - 1)) / (groups - 2)
        skewness = float((parts**3).sum()) / squares**1.5 * unbiased
    return Mean(mean, math.sqrt(squares), n, df, skewness)


def ratio_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the standard error of ``sum(b) / sum(a)`` over pairs (a, b) drawn independently; None
    for fewer than two (Cochran 1977, Sampling Techniques, section 6.3)."""
    if len(pairs) < 2:
        return None
    a, b = np.asarray(pairs, dtype=np.float64).T
    return mean_error(b - a * (b.sum() / a.sum())).error / float(a.mean())


def _spread_of_means(residuals: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the variance of each cluster's mean, up to a factor."""
    n, groups = len(residuals), len(sums)
    if groups == n:
        return np.ones(n)
    squares = float((sums**2 / sizes).sum())
    within = max(0.0, float(residuals @ residuals) - squares) / (n - groups)
    mean_size = (n - float(sizes @ sizes) / n) / (groups - 1)
    between = max(0.0, (squares / (groups - 1) - within) / mean_size)
    alike = between / (between + within) if between + within > 0 else 1.0
    return alike + (1 - alike) / sizes


def clustered_wilson(
    values: Any, clusters: Sequence[Any] | None = None, confidence: float = 0.95
) -> Interval:
    """Return Wilson's interval of the mean of ``values`` (n,), each in [0, 1], for their
    `effective_size`."""
    size = effective_size(values, clusters, confidence)
    return wilson(float(np.mean(values)) * size, size, confidence)


def effective_size(
    values: Any, clusters: Sequence[Any] | None = None, confidence: float = 0.95
) -> float:
    """Return the number of independent items that determine the mean of ``values`` (n,), each in
    [0, 1], as well.

    Items of a cluster are not independent. The effective n is p (1 - p) / error^2 (Dean and Pagano
    2015, doi:10.1093/jssam/smv024), at most n, times the squared ratio of Student's quantiles with
    n - 1 and with the error's degrees of freedom (Korn and Graubard 1998). If all values are equal,
    a cluster counts as one item.
    """
    values = _scores("values", values)
    for end in (values.min(), values.max()):
        check_between("value", end, 0, 1)
    mean = mean_error(values, clusters=clusters)
    n, (_, sizes) = len(values), _clusters(values, clusters)
    if len(sizes) == n:
        return n
    effective = n**2 / float(sizes @ sizes)
    if 0 < mean.error < math.inf:
        effective = min(n, mean.mean * (1 - mean.mean) / mean.error**2)
    if len(sizes) > 1:
        from scipy import special

        items, groups = special.stdtrit((n - 1, mean.df), (1 + confidence) / 2)
        effective *= float(items / groups) ** 2
    return effective


def wilson(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a rate (1927), which suits small n and rates near 0 or 1.

    scipy's (`scipy.stats.binomtest`) takes only integers, not an effective n.
    """
    check_between("successes", successes, 0, n)
    if n <= 0:
        raise InputError(f"n: expected a number above 0, got {n}")
    z = normal_quantile(confidence)
    rate, shrink = successes / n, 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    return Interval(low, 1.0 if successes == n else min(1.0, middle + half))


def compare(
    a: Any, b: Any, *, clusters: Sequence[Any] | None = None, confidence: float = 0.95
) -> PairedComparison:
    """Compare two models' scores (n,), (n,) on the same items, in the same order.

    - Scores 0 and 1 without clusters: McNemar's two-sided mid-p test on the items that only one
      model got right. The test is discrete: the mid-p value has mean 1/2 and is as uniform as its
      steps permit. With fewer than 20 such items it is conservative. It can exceed alpha slightly,
      which Fagerland, Lydersen and Laake (2013) never saw in practice. The interval is Bonett and
      Price's (2012), another calculation: in rare cases one excludes 0 and the other does not.
    - Other scores: the differences' `Mean`. Its interval excludes 0 exactly if p is below
      1 - confidence, except for fewer than six equal differences, where p is larger. Items (or
      clusters) are assumed to be independent; the module's docstring has the rejection rates.

    Swapping a and b changes the signs of difference, low and high and nothing else.
    """
    a, b = _scores("a", a), _scores("b", b)
    if len(a) != len(b):
        raise InputError(f"b: expected {len(a)} scores as in a, got {len(b)}")
    n, d, alpha = len(a), a - b, 1 - confidence
    mean = mean_error(d, clusters=clusters)
    sd = mean.error * math.sqrt(n)
    needed = None
    if clusters is None and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        p, test = _mcnemar(wins, losses), "mcnemar"
        interval = _bonett_price(wins, losses, n, confidence)
        effect = mcnemar_mde(n, (wins + losses) / n, alpha=alpha)
        if wins != losses:
            needed = mcnemar_items_needed(wins / n, losses / n, alpha=alpha)
    else:
        p, test, interval = mean.p_value(), "t", mean.interval(confidence)
        effect = mean_mde(n, sd, df=mean.df, alpha=alpha) if sd else math.inf
        if mean.mean and math.isfinite(sd):
            needed = items_needed(mean.mean, sd, alpha=alpha)
    varied = n > 1 and a.std() > 0 and b.std() > 0
    return PairedComparison(
        n=n,
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=mean.mean,
        low=interval.low,
        high=interval.high,
        p=p,
        correlation=float(np.corrcoef(a, b)[0, 1]) if varied else None,
        sd=sd,
        min_detectable_effect=effect,
        items_needed=needed,
        confidence=confidence,
        test=test,
    )


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given.

    The probability that any adjusted value of a true null is below alpha is at most alpha, for any
    dependence between the tests.
    """
    for p in pvalues:
        check_between("p", p, 0, 1)
    values = np.asarray(pvalues, dtype=np.float64)
    order = values.argsort()
    raised = np.minimum(1, np.arange(len(values), 0, -1) * values[order])
    return np.maximum.accumulate(raised)[order.argsort()].tolist()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that one of ``k`` answers passes, if ``c`` of ``n`` answers passed.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374).
    """
    check_between("n", n, 1)
    check_between("c", c, 0, n)
    check_between("k", k, 1, n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(counts: Sequence[int], scores: Sequence[float], n: int, k: int) -> float:
    """Return the expected score of the answer that most of ``k`` of ``n`` samples have
    (self-consistency, Wang et al. 2022, arXiv:2203.11171).

    It is the mean over all subsets of k samples, so unbiased. If m answers share the most votes, it
    is the mean of their scores; without a vote it is 0. Exact for n up to `MAX_COUNTED`, else the
    mean of `DRAWS` seeded draws, whose standard error is below 0.008.

    Args:
        counts: how many samples have each answer; the remaining samples have no vote.
        scores: of each answer, 0 to 1.
    """
    check_between("n", n, 1)
    check_between("k", k, 1, n)
    check_between("sum of counts", sum(counts), 0, n)
    if n > MAX_COUNTED:
        return _majority_by_draws(counts, scores, n, k)
    # k of n samples at random are independent binomial counts of each answer, given their sum
    total = math.fsum(
        score * _win_probability(counts, i, n, k) for i, score in enumerate(scores) if score
    )
    return total / _binomial(n, k / n)[k]


def _binomial(n: int, p: float) -> np.ndarray:
    """Return the probability of 0 to n successes in n trials."""
    return np.array([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])


def _win_probability(counts: Sequence[int], winner: int, n: int, k: int) -> float:
    """Return the probability that answer ``winner`` has the most of k votes, divided by the number
    of answers that share them, and that k votes are drawn."""
    share = k / n
    others = [_binomial(count, share) for i, count in enumerate(counts) if i != winner]
    blank = _binomial(n - sum(counts), share)
    total = 0.0
    for top, probability in enumerate(_binomial(counts[winner], share)[: k + 1]):
        if not top:
            continue
        rest = k - top
        ways = np.zeros((rest // top + 1, rest + 1))  # answers that share, votes of all others
        ways[0, 0] = probability
        for votes in others:
            next_ways = np.zeros_like(ways)
            for count, p in enumerate(votes[: min(top, rest + 1)]):
                next_ways[:, count:] += p * ways[:, : rest + 1 - count]
            if len(ways) > 1 and top < len(votes):
                next_ways[1:, top:] += votes[top] * ways[:-1, : rest + 1 - top]
            ways = next_ways
        shares = 1 / np.arange(1, len(ways) + 1)
        for count, p in enumerate(blank[: rest + 1]):
            total += p * float(shares @ ways[:, rest - count])
    return total


def _majority_by_draws(counts: Sequence[int], scores: Sequence[float], n: int, k: int) -> float:
    rng = np.random.default_rng(0)
    blank = n - sum(counts)
    votes = rng.multivariate_hypergeometric([*counts, blank], k, size=DRAWS)[:, :-1]
    top = votes.max(axis=1, initial=0, keepdims=True)
    tied = (votes == top) & (top > 0)
    return float((tied @ np.array(scores) / np.maximum(1, tied.sum(axis=1))).mean())


@dataclass(frozen=True)
class CorrectedRate:
    """A ``rate`` corrected for a judge's errors, with its interval ``low`` to ``high``."""

    rate: float
    low: float
    high: float


def rogan_gladen(
    rate: float,
    n: int,
    *,
    sensitivity: tuple[float, float],
    specificity: tuple[float, float],
    confidence: float = 0.95,
) -> CorrectedRate:
    """Correct the ``rate`` of ``n`` items that a judge flagged for the judge's own errors.

        (rate + specificity - 1) / (sensitivity + specificity - 1)        Rogan and Gladen 1978

    ``sensitivity`` is (flagged, all) of labelled items that should be flagged, ``specificity``
    (passed, all) of those that should not. The numbers may be effective ones (`effective_size`).
    The interval covers the errors of all three rates (Lang and Reiczigel 2014,
    doi:10.1016/j.prevetmed.2013.09.015); both are clipped to [0, 1]. Unlike theirs, the adjusted
    rate is clipped before its error is computed, so that no interval is a point.

    InputError: the judge is no better than chance, so it determines no rate.
    """
    check_between("rate", rate, 0, 1)
    check_between("n", n, 1)
    for name, (right, total) in (("sensitivity", sensitivity), ("specificity", specificity)):
        if total <= 0:
            raise InputError(f"{name} items: expected a number above 0, got {total}")
        check_between(name, right, 0, total)
    (tp, positives), (tn, negatives) = sensitivity, specificity
    gain = tp / positives + tn / negatives - 1
    if gain <= 0:
        raise InputError(
            "judge: expected sensitivity + specificity above 1, got"
            f" {tp}/{positives} + {tn}/{negatives} = {gain + 1:.3f}"
        )
    point = min(1.0, max(0.0, (rate + tn / negatives - 1) / gain))
    z = normal_quantile(confidence)
    shrunk_rate = (n * rate + z * z / 2) / (n + z * z)
    se, sp = (tp + 1) / (positives + 2), (tn + 1) / (negatives + 2)
    var_se, var_sp = se * (1 - se) / (positives + 2), sp * (1 - sp) / (negatives + 2)
    gain = se + sp - 1
    if gain <= 0:  # too few labelled items to show that the judge beats chance
        return CorrectedRate(point, 0.0, 1.0)
    true = min(1.0, max(0.0, (shrunk_rate + sp - 1) / gain))
    shift = 2 * z * z * (true * var_se - (1 - true) * var_sp)
    variance = (
        shrunk_rate * (1 - shrunk_rate) / (n + z * z) + true**2 * var_se + (1 - true) ** 2 * var_sp
    )
    half = z * math.sqrt(variance) / gain
    low, high = (min(1.0, max(0.0, true + shift + side)) for side in (-half, half))
    return CorrectedRate(point, min(low, point), max(high, point))


def _mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided mid-p value of Binomial(wins + losses, 1/2)."""
    from scipy import special

    total, fewer = wins + losses, min(wins, losses)
    below = special.bdtr(fewer - 1, total, 0.5) if fewer else 0.0
    return min(1.0, float(below + special.bdtr(fewer, total, 0.5)))


def _bonett_price(wins: int, losses: int, n: int, confidence: float) -> Interval:
    won, lost = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = normal_quantile(confidence) * math.sqrt((won + lost - (won - lost) ** 2) / (n + 2))
    return Interval(max(-1.0, won - lost - half), min(1.0, won - lost + half))


def _scores(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name}: expected a list of scores, got shape {array.shape}")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"{name}: expected finite scores, got {array[index]} at {index}")
    return array


def _clusters(values: np.ndarray, clusters: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of each cluster's values, and its size."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise InputError(f"clusters: expected {len(values)} names, got {len(clusters)}")
    indices: dict[Any, int] = {}
    members = [indices.setdefault(cluster, len(indices)) for cluster in clusters]
    return np.bincount(members, weights=values), np.bincount(members).astype(np.float64)


def normal_quantile(confidence: float) -> float:
    """Return the two-sided quantile of the normal distribution."""
    check_between("confidence", confidence, 0, 1)
    return quantile("confidence", (1 + confidence) / 2)
