"""The power of comparisons: the minimum detectable effect (MDE) for a number of items, and the
number of items for an effect.

"Detect" means a p-value of `fastlm.stats.intervals.compare` at or below ``alpha`` with a
probability of ``power``. For means this is Student's noncentral t for normal scores, with a
correction for few items. Differences skewed away from 0 are detected more often, those skewed
towards 0 less often (0.96 and 0.44 for 10 exponential ones). For rates it is the exact power of
McNemar's mid-p test. Near 0 and 1 the test is discrete and the two models have different variances,
so a normal approximation is too optimistic (its 0.8 at 10 of 200 right was 0.59).
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from fastlm.errors import InputError

TAIL_SIGMAS = 6.0  # standard deviations that contain all but 2e-9 of a binomial distribution
# loss of power by Hall's correction, at most MAX_FACTOR; fitted to draws of 4 to 500 items
HALL, MAX_FACTOR = (0.04, 0.6), 1.7
MIN_NORMAL = 100  # discordant items above which McNemar's test is nearly normal: power within 0.005


def mean_mde(
    n: int, sd: float, *, df: float | None = None, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Return the minimum detectable effect of ``n`` items on a mean: noncentrality sd / sqrt(n),
    which for many items is (z_alpha/2 + z_power) sd / sqrt(n).

    ``sd`` is the standard deviation of the difference per item (`PairedComparison.sd`), or of the
    score for a comparison with a fixed number such as chance. ``df``: degrees of freedom of sd,
    default n - 1. For two rates use `rate_mde`.
    """
    check_between("n", n, 1)
    return _noncentrality(n - 1 if df is None else df, alpha, power) * sd / math.sqrt(n)


def items_needed(difference: float, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the number of items that detect ``difference``; the inverse of `mean_mde`."""
    if difference == 0:
        raise InputError("difference: expected a number other than 0, got 0")
    n = max(2, math.ceil((_noncentrality(math.inf, alpha, power) * sd / difference) ** 2))
    while mean_mde(n, sd, alpha=alpha, power=power) > abs(
        difference
    ):  # Student's t needs a few more
        n += 1
    return n


def rate_mde(n: int, rate: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the minimum detectable effect on a ``rate``, if the other model's rate is nearer 1/2
    and the two models' answers are independent. Infinite if no rate is far enough away.
    """
    check_between("n", n, 1)
    check_between("rate", rate, 0, 1)
    p = min(rate, 1 - rate)
    return _solve_effect(
        lambda d: mcnemar_power(n, (p + d) * (1 - p), p * (1 - p - d), alpha),
        (4 * math.sqrt(2 * p * (1 - p) / n) + 12 / n, 1 - p),
        power,
    )


def share_mde(
    n: int, mean: float, error: float, *, df: float, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Return the minimum detectable effect on a ``mean`` of scores in [0, 1] with its standard
    ``error``, like `rate_mde`. The variance is assumed to be proportional to p (1 - p), as for a
    rate, so the other model's variance differs.
    """
    check_between("n", n, 1)
    p = min(mean, 1 - mean)
    rate = p * (1 - p)
    # if all scores are 0 or all 1, use the variance of a rate
    size = error**2 / rate if rate > 0 and error > 0 else 1 / n
    size *= _noncentrality(df, alpha, power) ** 2
    # d^2 = size (p (1 - p) + (p + d) (1 - p - d))
    linear = size * (1 - 2 * p)
    root = math.sqrt(linear**2 + 8 * (1 + size) * size * rate)
    d = (linear + root) / (2 * (1 + size)) if math.isfinite(size) else math.inf
    return d if d <= 1 - p else math.inf


def mcnemar_mde(n: int, discordant: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the minimum detectable effect if on a share ``discordant`` of ``n`` items only one of
    two models is right (or on a share of the size of the effect, if that is larger)."""
    check_between("n", n, 1)

    def power_of(d: float) -> float:
        share = max(discordant, d)
        return mcnemar_power(n, (share + d) / 2, (share - d) / 2, alpha)

    return _solve_effect(power_of, (4 * math.sqrt(discordant / n) + 12 / n, 1.0), power)


def mcnemar_items_needed(
    wins: float, losses: float, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Return the number of items that distinguish two models if only the first is right on a share
    ``wins`` of the items, and only the second on ``losses``."""
    share, difference = wins + losses, abs(wins - losses)
    if difference == 0:
        raise InputError("wins: expected another share than losses, got the same")
    reach = quantile("alpha", 1 - alpha / 2) * math.sqrt(share)
    reach += quantile("power", power) * math.sqrt(max(0.0, share - difference**2))
    n = max(1, math.ceil((reach / difference) ** 2))
    if n * share >= MIN_NORMAL:
        return n
    low, high = 0, 2 * n + 20  # with few discordant items the exact test needs more
    while high - low > 1:
        middle = (low + high) // 2
        enough = mcnemar_power(middle, wins, losses, alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def mcnemar_power(n: int, wins: float, losses: float, alpha: float = 0.05) -> float:
    """Return the probability that McNemar's mid-p test rejects at ``alpha``, two-sided, if only the
    first model is right on an item with probability ``wins``, only the second with ``losses``.

    The result is exact, or Miettinen's (1968) if `MIN_NORMAL` discordant items are expected.
    """
    share, difference = min(1.0, wins + losses), abs(wins - losses)
    if share <= 0:
        return 0.0
    if n * share >= MIN_NORMAL and difference < share:
        reach = math.sqrt(n) * difference - quantile("alpha", 1 - alpha / 2) * math.sqrt(share)
        return NormalDist().cdf(reach / math.sqrt(share - difference**2))
    from scipy import special

    spread = TAIL_SIGMAS * math.sqrt(n * share * (1 - share)) + TAIL_SIGMAS
    first, last = max(0, math.floor(n * share - spread)), min(n, math.ceil(n * share + spread))
    m = np.arange(first, last + 1)  # discordant items
    log_binomial = special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1)
    weights = np.exp(log_binomial + special.xlogy(m, share) + special.xlog1py(n - m, -share))
    critical = _critical_losses(m, alpha)
    some = critical >= 0
    one_way = min(1.0, wins / share)
    tails = sum(special.bdtr(critical[some], m[some], q) for q in (one_way, 1 - one_way))
    return float(weights[some] @ tails)


def _critical_losses(m: np.ndarray, alpha: float) -> np.ndarray:
    """Return the largest number of ``m`` (M,) discordant items that the worse model may win while
    the test rejects; -1 if it never rejects."""
    from scipy import special

    max_losses = (m - 1) // 2
    # the normal quantile is off by at most one item
    k = np.floor(m / 2 - quantile("alpha", 1 - alpha / 2) * np.sqrt(m) / 2) + 1
    k = np.clip(k, -1, max_losses).astype(np.int64)
    active = np.flatnonzero(k >= 0)
    while len(active):
        tries, totals = k[active], m[active]
        below = np.where(tries > 0, special.bdtr(np.maximum(tries - 1, 0), totals, 0.5), 0.0)
        active = active[below + special.bdtr(tries, totals, 0.5) > alpha]
        k[active] -= 1
        active = active[k[active] >= 0]
    return k


def _solve_effect(
    power_of: Callable[[float], float], ends: tuple[float, float], power: float
) -> float:
    """Return the effect with this ``power``; infinite if the second of ``ends`` has less. Usually
    it is below the first."""
    from scipy.optimize import brentq

    quantile("power", power)  # refuses 0 and 1
    for high in (min(ends), ends[1]):
        if power_of(high) >= power:
            root: Any = brentq(lambda d: power_of(d) - power, 0.0, high, xtol=1e-5)
            return float(root)
    return math.inf


def _noncentrality(df: float, alpha: float, power: float) -> float:
    """Return the distance of a detectable difference from 0, in standard errors."""
    reach = quantile("alpha", 1 - alpha / 2) + quantile("power", power)
    if df <= 0:
        return math.inf
    if math.isinf(df):
        return reach
    from scipy import special

    t = special.stdtrit(df, 1 - alpha / 2)
    reach = float(special.nctdtrinc(df, 1 - power, t))
    return reach * min(MAX_FACTOR, 1 + reach**2 * (HALL[0] / df + HALL[1] / df**2))


def quantile(name: str, p: float) -> float:
    """Return the normal distribution's ``p`` quantile. InputError: p is not in (0, 1)."""
    if not 0 < p < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {p}")
    return NormalDist().inv_cdf(p)


def check_between(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise InputError unless ``low <= value <= high``."""
    if not low <= value <= high:
        bounds = f"{low} or more" if high == math.inf else f"{low} to {high}"
        raise InputError(f"{name}: expected {bounds}, got {value}")
