"""Error rates by simulation: what is said to happen in 5 % (80 %) of cases does.

Each simulation has a short form, which finds gross faults within a second, and the whole one
(`exhaustive`, in `make test-all`), whose bounds are those of the docstrings.
"""

import math

import numpy as np
import pytest

from fastlm.stats.intervals import _mcnemar, clustered_wilson, mean_error
from fastlm.stats.latency import BOUND, PacePairs, compare_paces
from fastlm.stats.power import mean_mde, rate_mde, share_mde

DRAWS = pytest.mark.parametrize(
    "draws", [150, pytest.param(2000, marks=pytest.mark.exhaustive)], ids=["short", "whole"]
)
FEW_DRAWS = pytest.mark.parametrize(
    "draws", [15, pytest.param(500, marks=pytest.mark.exhaustive)], ids=["short", "whole"]
)


def above(rate: float, draws: int) -> float:
    """Return a bound that a rate exceeds in 1 of 1,000 simulations."""
    return rate + 3.1 * math.sqrt(rate * (1 - rate) / draws)


# ---- means of skewed differences

DIFFERENCES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "two values": lambda rng, n: rng.choice([-1.0, 1.0], n) + 0.1 * rng.normal(size=n),
    "ties": lambda rng, n: rng.choice([-0.5, 0, 0.25, 1], n, p=[0.3, 0.45, 0.2, 0.05]) + 0.05,
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "lognormal 0.5": lambda rng, n: rng.lognormal(0, 0.5, n) - math.exp(0.125),
    "lognormal 1": lambda rng, n: rng.lognormal(0, 1, n) - math.exp(0.5),
}
# where more than 0.05 are rejected: the table of `fastlm.stats.intervals`
REJECTED = {("exponential", 10): 0.055, ("lognormal 0.5", 10): 0.055, ("lognormal 0.5", 20): 0.055,
            ("lognormal 1", 10): 0.085, ("lognormal 1", 20): 0.07}  # fmt: skip


@DRAWS
@pytest.mark.parametrize("n", [10, 20, 50, 200])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_equal_means_are_rejected_as_often_as_said(name, n, draws):
    rng = np.random.default_rng(n)
    rejected = 0
    for _ in range(draws):
        d = DIFFERENCES[name](rng, n)
        mean = mean_error(d)
        low = mean.p_value()
        rejected += low <= 0.05
        interval = mean.interval()
        assert (interval.low <= 0 <= interval.high) == (low >= 0.05)  # one calculation
    assert rejected / draws < above(REJECTED.get((name, n), 0.05), draws)


# ---- clusters of unequal size

SIZES = {
    "equal": lambda rng, g: np.full(g, 5),
    "lognormal 1": lambda rng, g: np.maximum(1, rng.lognormal(1.5, 1.0, g).astype(int)),
    "lognormal 1.5": lambda rng, g: np.maximum(1, rng.lognormal(1.5, 1.5, g).astype(int)),
    "lognormal 2": lambda rng, g: np.maximum(1, rng.lognormal(1.0, 2.0, g).astype(int)),
    "few with most": lambda rng, g: np.repeat([100, 3], [max(2, g // 10), g - max(2, g // 10)]),
    "one with most": lambda rng, g: np.repeat([100, 3], [1, g - 1]),
}


@DRAWS
@pytest.mark.parametrize("groups", [10, 30])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("alike", [0.0, 0.2, 1.0])
def test_intervals_of_clusters_cover(alike, sizes, groups, draws):
    rng = np.random.default_rng(groups)
    missed = 0
    for _ in range(draws):
        count = np.minimum(SIZES[sizes](rng, groups), 1000)
        names = np.repeat(np.arange(groups), count)
        values = math.sqrt(alike) * rng.normal(size=groups)[names]
        values = values + math.sqrt(1 - alike) * rng.normal(size=len(names))
        interval = mean_error(values, clusters=names).interval()
        missed += not interval.low <= 0 <= interval.high
    assert missed / draws < above(0.05, draws)


@DRAWS
@pytest.mark.parametrize("groups", [10, 30])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_intervals_of_rates_of_clusters_cover(rate, sizes, groups, draws):
    rng = np.random.default_rng(groups)
    missed = 0
    for _ in range(draws):
        count = np.minimum(SIZES[sizes](rng, groups), 1000)
        names = np.repeat(np.arange(groups), count)
        cluster_scores = rng.beta(5 * rate, 5 * (1 - rate), groups)  # of each cluster
        interval = clustered_wilson(
            (rng.random(len(names)) < cluster_scores[names]).astype(float), names
        )
        missed += not interval.low <= rate <= interval.high
    # a tenth of the clusters with most of the items and rates of 0.1: few clusters have any
    assert missed / draws < above(0.08 if rate == 0.1 else 0.05, draws)


# ---- minimum detectable effects


@DRAWS
@pytest.mark.parametrize("n", [5, 10, 20, 50, 200])
def test_an_effect_on_a_mean_is_found_four_times_in_five(n, draws):
    rng = np.random.default_rng(n)
    effect = mean_mde(n, 1.0)
    detected = sum(mean_error(effect + rng.normal(size=n)).p_value() <= 0.05 for _ in range(draws))
    assert abs(detected / draws - 0.8) < 0.02 + 3.1 * math.sqrt(0.16 / draws)


@DRAWS
@pytest.mark.parametrize(
    "n, right", [(200, 10), (100, 2), (100, 0), (100, 98), (164, 20), (50, 25)]
)
def test_an_effect_on_a_rate_is_found_four_times_in_five(n, right, draws):
    rng = np.random.default_rng(n)
    rate = right / n
    effect = rate_mde(n, rate) * (1 if rate <= 0.5 else -1)
    detected = 0
    for _ in range(draws):
        a, b = rng.random(n) < rate + effect, rng.random(n) < rate
        detected += _mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) <= 0.05
    assert abs(detected / draws - 0.8) < 0.01 + 3.1 * math.sqrt(0.16 / draws)


@DRAWS
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_an_effect_on_shares_of_passages_is_found_four_times_in_five(rate, draws):
    """Questions have 60 passages; the effect is computed from the average error and mean."""
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(60), rng.integers(1, 9, 60))

    def right(p):
        cluster_scores = rng.beta(6 * p, 6 * (1 - p), 60)  # of each passage
        return (rng.random(len(names)) < cluster_scores[names]).astype(float)

    some = [mean_error(right(rate), clusters=names) for _ in range(50)]
    error = math.sqrt(np.mean([mean.error**2 for mean in some]))
    df = float(np.mean([mean.df for mean in some]))
    effect = share_mde(len(names), rate, error, df=df)
    detected = 0
    for _ in range(draws):
        d = right(rate + effect) - right(rate)
        detected += mean_error(d, clusters=names).p_value() <= 0.05
    assert abs(detected / draws - 0.8) < 0.05 + 3.1 * math.sqrt(0.16 / draws)


# ---- the canary's rule on slow answers


def burst_paces(rng, n: int, length: float) -> np.ndarray:
    """Seconds per token of conversations in a row, a third of which fall into bursts of load of
    ``length`` in the mean, in which answers take five times as long.
    """
    busy, state = np.zeros(n), False
    for i, draw in enumerate(rng.random(n)):
        state = draw > 1 / length if state else draw < 0.5 / length
        busy[i] = state
    return (1 + 4 * busy) * np.exp(0.3 * rng.normal(size=n))


def decided_after(rng, slower: float, share: float, length: float, max_pairs: int) -> int | None:
    """Return after how many conversations a canary that takes ``slower`` times as long is rolled
    back."""
    paces, pairs = burst_paces(rng, max_pairs, length), PacePairs()
    for i, (pace, new) in enumerate(zip(paces, rng.random(max_pairs) < share)):
        before = pairs.counts
        pairs.add("new" if new else "old", pace * slower if new else pace)
        counts = pairs.counts
        if counts is before or counts.new - counts.old <= BOUND * counts.total:
            continue
        if compare_paces(counts, 0.05).low > BOUND:
            return i + 1
    return None


@FEW_DRAWS
@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("length", [3, 20, 100])
def test_load_in_bursts_rolls_no_equal_model_back(length, share, draws):
    rng = np.random.default_rng(int(length))
    ended = [decided_after(rng, 1.0, share, length, 1000) for _ in range(draws)]
    assert sum(model is not None for model in ended) / draws < above(0.05, draws)


@FEW_DRAWS
@pytest.mark.parametrize("share, max_pairs", [(0.5, 400), (0.1, 1100)])
def test_a_slower_model_is_noticed(share, max_pairs, draws):
    """Three times as slow, in bursts of 20: in nine of ten trials within 400 conversations where
    half of them go to the canary, 1,100 where a tenth do.
    """
    rng = np.random.default_rng(1)
    ended = [decided_after(rng, 3.0, share, 20, max_pairs) for _ in range(draws)]
    assert sum(model is None for model in ended) / draws < above(0.1, draws)
