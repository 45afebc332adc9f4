"""Sequential tests of two arms, which may be checked after every observation.

If the p-value of a fixed-size test is watched until it is below 0.05, the test will find a
difference sooner or later where there is none. Here the probability that the p-value is ever at or
below alpha, or that the interval ever excludes the true difference, is at most alpha. So you may
stop at any time. A p-value may rise again after it was below alpha; the decision made at that time
remains valid.

Both tests are mixtures of likelihood ratios, which are test martingales under the null (Ville's
inequality; Howard et al. 2021, arXiv:1810.08240; Waudby-Smith and Ramdas 2023, arXiv:2010.09686):

- `compare_rates` compares counts of two arms of any sizes (a canary gets 10 % of the requests).
- `SequentialTest` compares pairs: both models answered the same request. It needs half the answers.

They are valid for any number of observations and use no normal approximation. To distinguish rates
of 0.6 and 0.5 at alpha = 0.05 they need 1,750 observations in the median (2,710 in four of five
cases) over two equal arms, 4,980 (7,680) if one arm gets a tenth of them, and 430 pairs (730).

The rejected alternative is the mixture SPRT on a normal difference (Johari et al. 2015,
arXiv:1512.04922). It is faster, but its bound is asymptotic, and a canary begins with counts of 0
and 1.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastlm.stats.power import check_between, quantile

STEPS = 50  # of a bisection or a golden section: below 1e-10
BETS = np.geomspace(0.004, 0.9, 25)  # as shares of the largest bet; the best bet is mean / variance
MEANS = 401  # grid of differences from -1 to 1 for the ends of an interval


class SequentialResult(NamedTuple):
    """A difference with its always-valid interval ``low`` to ``high`` and p-value."""

    difference: float
    low: float
    high: float
    p: float


def compare_rates(
    successes_a: int, n_a: int, successes_b: int, n_b: int, alpha: float = 0.05
) -> SequentialResult:
    """Compare the success rates of two arms: a's rate minus b's.

    For rates (p_a, p_b) the e-value is the product over arms of

        B(s + 1/2, f + 1/2) / B(1/2, 1/2) / (p^s (1 - p)^f)

    a likelihood ratio with Jeffreys' prior. p is 1 / its minimum over p_a = p_b. The interval
    contains the differences of all (p_a, p_b) with an e-value below 1 / alpha, so it excludes 0
    exactly if p <= alpha. The choice of the next arm may depend on the past. Observations of an arm
    must be independent with the same rate.
    """
    quantile("alpha", alpha)
    for name, s, n in (("a", successes_a, n_a), ("b", successes_b, n_b)):
        check_between(f"successes_{name}", s, 0, n)
    rate_a = successes_a / n_a if n_a else 0.5
    rate_b = successes_b / n_b if n_b else 0.5
    arms = (successes_a, n_a), (successes_b, n_b)
    mixed = sum(_log_beta(s + 0.5, n - s + 0.5) - _log_beta(0.5, 0.5) for s, n in arms)

    def log_e(difference: float) -> float:
        """Return the minimum over rates with this difference; it is convex in both."""

        def at(p_b: float) -> float:
            return mixed - _log_rate(arms[0], p_b + difference) - _log_rate(arms[1], p_b)

        return _convex_minimum(at, max(0.0, -difference), min(1.0, 1.0 - difference))

    bound = -math.log(alpha)
    pooled = (successes_a + successes_b) / max(1, n_a + n_b)
    e_equal = mixed - sum(_log_rate(arm, pooled) for arm in arms)
    difference = rate_a - rate_b
    low = _bisect_edge(lambda d: log_e(d) < bound, difference, -1.0)
    high = _bisect_edge(lambda d: log_e(d) < bound, difference, 1.0)
    return SequentialResult(difference, low, high, min(1.0, math.exp(-e_equal)))


class SequentialTest:
    """A sequential test of paired scores in [0, 1], new minus old, on the same requests.

    Wealth is bet on the sign of the difference x in [-1, 1]: it is the mean over bets of the
    product of 1 + bet (x - m) over requests. If E[x | past] = m, its expectation is always 1, for
    every distribution. Positive bets grow if the mean is above m, negative bets if it is below;
    each side may spend alpha / 2. `p` is 2 / the wealth at m = 0. The interval contains the means m
    with a wealth below 2 / alpha; its ends are rounded outwards to 1/200.

    >>> test = SequentialTest(alpha=0.05)
    >>> for new, old in [(1, 0)] * 12:
    ...     test.add(new, old)
    >>> test.p < 0.05 and test.result().low > 0
    True
    """

    def __init__(self, alpha: float = 0.05):
        quantile("alpha", alpha)  # refuses alpha outside 0 to 1
        self.alpha, self.n = alpha, 0
        self._counts: Counter[float] = Counter()  # of differences

    def add(self, new: float, old: float, *, times: int = 1) -> None:
        """Add one request's scores, or those of ``times`` requests with the same scores."""
        for name, value in (("new", new), ("old", old)):
            check_between(name, value, 0, 1)
        self.n += times
        self._counts[new - old] += times

    @property
    def p(self) -> float:
        """The current p-value; 1 before any request."""
        return min(1.0, 2 * math.exp(-self._log_wealth(np.zeros(1)).max()))

    def result(self) -> SequentialResult:
        """Return the current result; before any request it is 0, -1 to 1, p = 1."""
        means = np.linspace(-1, 1, MEANS)
        below, above = self._log_wealth(means) < math.log(2 / self.alpha)
        # wealth falls with m on the first side and rises on the second: one end per side
        low = means[max(int(below.argmax()) - 1, 0)] if below.any() else 1.0
        last = MEANS - 1 - int(above[::-1].argmax())
        high = means[min(last + 1, MEANS - 1)] if above.any() else -1.0
        difference = sum(x * count for x, count in self._counts.items()) / max(1, self.n)
        return SequentialResult(difference, float(low), float(high), self.p)

    def _log_wealth(self, means: np.ndarray) -> np.ndarray:
        """Return the log wealth (2, M) at ``means`` (M,) of bets above and below 0."""
        largest_bet = np.maximum(
            1 + np.stack([means, -means]), 1 / MEANS
        )  # 1 + bet (x - m) stays above 0
        bets = np.array([1, -1])[:, None, None] * BETS / largest_bet[..., None]  # (2, M, bets)
        total = np.zeros_like(bets)
        for x, count in self._counts.items():
            total += count * np.log1p(bets * (x - means[:, None]))
        top = total.max(axis=2)
        return top + np.log(np.exp(total - top[..., None]).mean(axis=2))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_rate(arm: tuple[int, int], p: float) -> float:
    """Return the log-likelihood of the arm's counts."""
    s, n = arm
    if (s and p <= 0) or (n - s and p >= 1):
        return -math.inf
    return (s * math.log(p) if s else 0.0) + ((n - s) * math.log1p(-p) if n - s else 0.0)


def _convex_minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the minimum of a convex function, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return min(function(low), function(high), function((low + high) / 2))


def _bisect_edge(inside: Callable[[float], bool], start: float, end: float) -> float:
    """Return the last inside point between ``start``, which is inside, and ``end``."""
    if inside(end):
        return end
    for _ in range(STEPS):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return end
