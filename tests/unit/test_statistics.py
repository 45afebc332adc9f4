"""Standard errors, intervals and comparisons: their rates hold in simulation, at fixed seeds."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from fastlm.errors import InputError
from fastlm.stats import intervals
from fastlm.stats.intervals import (
    Mean,
    _mcnemar,
    clustered_wilson,
    compare,
    holm,
    majority_at_k,
    mean_error,
    pass_at_k,
    rogan_gladen,
    wilson,
)
from fastlm.stats.power import (
    items_needed,
    mcnemar_items_needed,
    mcnemar_power,
    mean_mde,
    rate_mde,
    share_mde,
)

PAIRS = 500
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.5)


def distance_from_uniform(pvalues: list[float]) -> float:
    """Return Kolmogorov and Smirnov's statistic; 1 of 100 samples exceeds 1.63 / sqrt(n)."""
    p, n = np.sort(pvalues), len(pvalues)
    return float(max((np.arange(1, n + 1) / n - p).max(), (p - np.arange(n) / n).max()))


def assert_uniform(pvalues: list[float], steps: float = 0.0) -> None:
    """Assert that p-values are uniform. ``steps``: half the largest step of a discrete test."""
    n = len(pvalues)
    assert distance_from_uniform(pvalues) < 1.63 / math.sqrt(n) + steps
    for alpha in ALPHAS:
        rejected = float((np.array(pvalues) <= alpha).mean())
        assert abs(rejected - alpha) < 3 * math.sqrt(alpha * (1 - alpha) / n) + steps, alpha


def right_or_wrong(rng, n):
    ease = rng.uniform(0.1, 0.9, n)  # items differ, so that the scores of two models correlate
    return lambda: (rng.random(n) < ease).astype(float)


def bits(rng, n):
    base = rng.gamma(2, 1, n)
    return lambda: base + rng.standard_t(4, n)


@pytest.mark.parametrize(
    "scores, n, test", [(right_or_wrong, 400, "mcnemar"), (bits, 60, "t"), (bits, 6000, "t")]
)
def test_pvalues_are_uniform_and_intervals_cover_where_models_are_equal(scores, n, test):
    """Few and skewed differences: `test_simulations.py`."""
    rng = np.random.default_rng(7)
    pvalues, covered = [], 0
    for _ in range(PAIRS):
        score = scores(rng, n)
        result = compare(score(), score())
        pvalues.append(result.p)
        covered += result.low <= 0 <= result.high
        assert result.test == test
    # about 170 items are right for one model only: P(exactly half of them) is 0.06
    assert_uniform(pvalues, steps=0.03 if test == "mcnemar" else 0.01)
    assert abs(covered / PAIRS - 0.95) < 3 * math.sqrt(0.05 * 0.95 / PAIRS)


@pytest.mark.parametrize("n, passages", [(200, 40)])
def test_items_of_a_passage_are_one_draw(n, passages):
    rng = np.random.default_rng(3)
    passage = np.repeat(np.arange(passages), n // passages)
    pvalues, unclustered = [], []
    for turn in range(PAIRS):
        lucky = rng.normal(size=passages)[passage]  # one model likes a passage more
        a, b = rng.normal(size=n) + lucky, rng.normal(size=n)
        pvalues.append(compare(a, b, clusters=passage).p)
        if turn < 100:
            unclustered.append(compare(a, b).p)
    assert_uniform(pvalues, steps=0.01)
    assert (np.array(unclustered) <= 0.05).mean() > 0.1  # the error that clusters correct


def test_with_few_discordant_items_mcnemar_is_conservative():
    rng = np.random.default_rng(0)
    pvalues = []
    for _ in range(PAIRS):
        a, b = rng.random((2, 20)) < 0.2
        pvalues.append(_mcnemar(int((a & ~b).sum()), int((b & ~a).sum())))
    for alpha in (0.01, 0.05, 0.1):
        assert np.mean(np.array(pvalues) <= alpha) <= alpha + 0.01


@pytest.mark.parametrize("scores", [right_or_wrong, bits])
@pytest.mark.parametrize("n", [1, 2, 9, 300])
@pytest.mark.parametrize("clusters", [None, 3])
def test_a_comparison_is_symmetric(scores, n, clusters):
    rng = np.random.default_rng(n)
    score = scores(rng, n)
    a, b = score(), score()
    names = None if clusters is None else [f"passage {i // clusters}" for i in range(n)]
    there, back = compare(a, b, clusters=names), compare(b, a, clusters=names)
    assert there.difference == -back.difference
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), rel=1e-12)
    same = ("n", "correlation", "sd", "min_detectable_effect", "items_needed", "test")
    assert all(getattr(there, name) == pytest.approx(getattr(back, name)) for name in same)
    assert (there.mean_a, there.mean_b) == (back.mean_b, back.mean_a)
    assert there.p == pytest.approx(back.p, rel=1e-12) and 0 < there.p <= 1


def test_mcnemar_by_hand():
    a, b = [1] * 9 + [0] * 3 + [1] * 8, [0] * 9 + [1] * 3 + [1] * 8
    tail = sum(math.comb(12, k) for k in range(3)) + math.comb(12, 3) / 2
    assert compare(a, b).p == pytest.approx(2 * tail / 2**12)
    assert compare(a, b).difference == pytest.approx(6 / 20)
    assert compare(a, a).p == 1 and compare(a, a).items_needed is None


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [3, 8, 40])
@pytest.mark.parametrize("clusters", [None, [0, 1, 2, 0, 0, 2, 3, 4]])
def test_the_interval_holds_what_the_test_does_not_reject(n, clusters, confidence):
    values = np.random.default_rng(n).lognormal(size=n)
    names = None if clusters is None else (clusters * 5)[:n]
    mean = mean_error(values, clusters=names)
    interval = mean.interval(confidence)
    assert interval.low < mean.mean < interval.high
    assert mean.skewness != 0 or n == 3
    for end in (interval.low, interval.high):
        assert mean.p_value(end) == pytest.approx(1 - confidence)
    result = compare(values, np.zeros(n), clusters=names, confidence=confidence)
    assert (result.low, result.high, result.p) == (interval.low, interval.high, mean.p_value())
    middle = interval.high - interval.low, 2 * (mean.mean - interval.low)
    assert names or middle[0] > middle[1]  # it reaches farther where the long tail is


def test_halls_transformation_by_hand():
    d = np.array([0.1, 0.3, 0.2, 1.9])
    n, mean, sd = 4, d.mean(), d.std(ddof=1)
    t = 2 * mean / sd
    skewness = ((d - mean) ** 3).mean() / d.std() ** 3 * math.sqrt(n * (n - 1)) / (n - 2)
    u = t / math.sqrt(n)
    hall = u + skewness * u**2 / 3 + skewness**2 * u**3 / 27 + skewness / (6 * n)
    result = mean_error(d)
    assert result.skewness == pytest.approx(skewness / math.sqrt(n)) and result.df == 3
    minimum = min(t, math.sqrt(n) * hall)
    assert result.p_value() == pytest.approx(2 * scipy.stats.t.sf(minimum, 3))


def test_equal_models_without_spread():
    result = compare([0.5, 0.25], [0.5, 0.25])
    assert (result.difference, result.low, result.high, result.p, result.sd) == (0, 0, 0, 1, 0)
    assert result.min_detectable_effect == math.inf  # nothing says how much differences vary
    assert compare([0.5], [0.25]).sd == math.inf and compare([0.5], [0.25]).items_needed is None
    assert compare([0.5], [0.25]).p == 1 and compare([0.5], [0.25]).low == -math.inf
    for n in (2, 5, 9):  # the same difference everywhere, but for rounding: its sign says how sure
        values = np.linspace(0, 1, n)
        assert compare(values + 0.1, values).p == pytest.approx(2.0 ** (1 - n))
    assert compare([1.0, 1.0], [0.5, 0.2]).correlation is None


def test_the_number_of_items_finds_the_difference_four_times_in_five():
    rng = np.random.default_rng(5)
    sd = math.sqrt(0.6 * 0.4 + 0.5 * 0.5)
    n = items_needed(0.1, sd)
    assert mean_mde(n, sd) == pytest.approx(0.1, abs=1e-3) and mean_mde(n, sd) <= 0.1
    assert rate_mde(n, 0.5) == pytest.approx(0.1, abs=2e-3)
    detected = sum(
        compare(rng.random(n) < 0.6, rng.random(n) < 0.5).p <= 0.05 for _ in range(PAIRS)
    )
    assert abs(detected / PAIRS - 0.8) < 3 * math.sqrt(0.8 * 0.2 / PAIRS)
    assert items_needed(90.0, 0.1) == 2
    for true in (0.3, 1.0, 2.5):
        n = items_needed(true, 1.0)
        assert mean_mde(n, 1.0) <= true < mean_mde(n - 1, 1.0)


@pytest.mark.parametrize("n, wins, losses", [(30, 0.2, 0.05), (60, 0.15, 0.03), (12, 0.5, 0.0)])
def test_the_power_of_mcnemars_test_is_the_sum_over_all_outcomes(n, wins, losses):
    power = 0.0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            if _mcnemar(won, lost) <= 0.05:
                counts = [won, lost, n - won - lost]
                power += scipy.stats.multinomial.pmf(counts, n, [wins, losses, 1 - wins - losses])
    assert mcnemar_power(n, wins, losses) == pytest.approx(power, abs=1e-6)


def test_effects_on_rates_near_0_and_1():
    for n, rate in ((200, 0.05), (100, 0.02), (100, 0.0), (50, 0.5), (2000, 0.3)):
        effect = rate_mde(n, rate)
        power = mcnemar_power(n, (rate + effect) * (1 - rate), rate * (1 - rate - effect))
        assert power == pytest.approx(0.8, abs=1e-3)
        assert rate_mde(n, 1 - rate) == pytest.approx(effect, abs=1e-4)  # the other way
        normal = mean_mde(n, math.sqrt(2 * rate * (1 - rate)), df=math.inf)
        assert effect > normal or rate == 0.5  # what was said before: 0 at 0 of n
    assert rate_mde(4, 0.0) == math.inf  # four items never reach p = 0.05
    # scores in [0, 1] that are no rates: nearly the same where the normal approximation holds
    error = math.sqrt(0.3 * 0.7 / 2000)
    share = share_mde(2000, 0.3, error, df=1999)
    assert share == pytest.approx(rate_mde(2000, 0.3), rel=0.01)
    assert 0.02 < share_mde(200, 0.0, 0.0, df=199) < 0.05
    assert share_mde(3, 0.5, 0.5, df=2) == math.inf
    result = compare([1, 0, 1, 1] * 25, [1, 0, 1, 1] * 25)  # no item tells the models apart
    assert result.min_detectable_effect == pytest.approx(rate_mde(100, 0.0), abs=1e-4)


@pytest.mark.parametrize("wins, losses", [(0.1, 0.05), (0.03, 0.01), (0.03, 0.0), (0.3, 0.28)])
def test_items_that_tell_apart_what_few_items_do(wins, losses):
    n = mcnemar_items_needed(wins, losses)
    assert mcnemar_power(n, wins, losses) == pytest.approx(0.8, abs=0.01)
    assert mcnemar_power(int(0.9 * n), wins, losses) < 0.78


def test_mean_error():
    values = np.random.default_rng(0).normal(size=50)
    plain = mean_error(values)
    assert plain.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert mean_error(values, clusters=range(50)).error == pytest.approx(plain.error)
    five_times = mean_error(np.repeat(values, 5), clusters=np.repeat(np.arange(50), 5))
    assert five_times.error == pytest.approx(plain.error)
    assert mean_error([1.0]).error == math.inf
    assert mean_error([1.0, 2.0], clusters="aa") == Mean(1.5, math.inf, 2, 0.0)


def test_the_error_of_clusters_is_unbiased_and_has_satterthwaites_freedom():
    """The expected error comes from Bell and McCaffrey's matrices with the values' correlation."""
    rng = np.random.default_rng(2)
    sizes = np.array([40, 3, 1, 7, 2])
    groups, n = len(sizes), sizes.sum()
    names = np.repeat(np.arange(groups), sizes)
    values = rng.normal(size=groups)[names] + rng.normal(size=n)
    means = np.array([values[names == g].mean() for g in range(groups)])
    within = sum(((values[names == g] - means[g]) ** 2).sum() for g in range(groups)) / (n - groups)
    between = (sizes @ (means - values.mean()) ** 2) / (groups - 1)
    alike = (between - within) / ((n - sizes @ sizes / n) / (groups - 1))
    alike = max(0.0, alike) / (max(0.0, alike) + within)
    assert 0.1 < alike < 1
    spread = np.diag(alike + (1 - alike) / sizes)  # of the clusters' means
    weights = sizes / n
    residual = np.eye(groups) - np.outer(np.ones(groups), weights)
    covariance = residual @ spread @ residual.T
    form = np.diag(weights**2 * np.diag(spread) / np.diag(covariance))
    e = means - values.mean()
    detected = mean_error(values, clusters=names)
    assert detected.error**2 == pytest.approx(e @ form @ e)
    expected = np.trace(form @ covariance)
    assert expected == pytest.approx(weights @ spread @ weights)  # the variance of the mean
    product = form @ covariance
    assert detected.df == pytest.approx(expected**2 / np.trace(product @ product))
    assert detected.df < 2  # nearly all items are of one cluster


def test_rates_of_clusters():
    right = np.array([1.0] * 30 + [0.0] * 20 + [1.0] * 10)
    assert clustered_wilson(right) == wilson(40, 60)
    pairs = np.repeat(np.arange(30), 2)
    alike = clustered_wilson(right, pairs)  # each pair is right or wrong together
    assert alike.high - alike.low > 1.3 * (wilson(40, 60).high - wilson(40, 60).low)
    few = clustered_wilson(right, [min(i, 50) // 50 for i in range(60)])  # two clusters
    assert few.high - few.low > 0.8
    same = clustered_wilson(np.ones(60), pairs)
    assert same.high == 1 and wilson(30, 30).low - 0.02 < same.low < wilson(30, 30).low
    with pytest.raises(InputError, match=r"value: expected 0 to 1, got 1\.5"):
        clustered_wilson([1.5, 0])


def test_wilson():
    assert (wilson(0, 10).low, wilson(10, 10).high) == (0, 1)
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)  # Newcombe 1998, table I
    assert wilson(81, 263).low == pytest.approx(0.2553, abs=1e-4)
    assert wilson(81, 263).high == pytest.approx(0.3662, abs=1e-4)
    for rate in (0.02, 0.3, 0.5):  # coverage, exact over all counts; below 0.95 by steps alone
        inside = [k for k in range(101) if wilson(k, 100).low <= rate <= wilson(k, 100).high]
        cover = sum(math.comb(100, k) * rate**k * (1 - rate) ** (100 - k) for k in inside)
        assert 0.93 < cover < 0.99, rate


def test_holm_does_not_cry_wolf():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    tables = rng.random((1000, 20))
    assert np.mean([min(table) <= 0.05 for table in tables]) > 0.5
    assert np.mean([min(holm(list(table))) <= 0.05 for table in tables]) < 0.05 + 0.02


def test_pass_at_k_is_the_mean_over_all_draws():
    passed = [1, 0, 0, 1, 0, 0, 0]
    for k in range(1, 8):
        draws = [max(draw) for draw in itertools.combinations(passed, k)]
        assert pass_at_k(7, 2, k) == pytest.approx(np.mean(draws))
    assert pass_at_k(200, 0, 100) == 0 and pass_at_k(5, 5, 1) == 1
    assert pass_at_k(2000, 1, 1) == pytest.approx(1 / 2000)


def test_majority_at_k_is_the_mean_over_all_draws():
    """Enumerated: all subsets of size k, ties shared, samples without a vote left out."""
    cases = [([3, 2, 2], [0, 1, 0], 9), ([1] * 6, [1, 0, 0.5, 0, 0, 0], 6), ([4, 4], [1, 0], 10),
             ([], [], 3), ([5], [1], 7)]  # fmt: skip
    for counts, scores, n in cases:
        samples = [i for i, count in enumerate(counts) for _ in range(count)]
        samples += [None] * (n - len(samples))
        for k in range(1, n + 1):
            draws = []
            for draw in itertools.combinations(samples, k):
                votes = [draw.count(i) for i in range(len(counts))]
                most = max(votes, default=0)
                tied = [score for score, vote in zip(scores, votes) if vote == most]
                draws.append(np.mean(tied) if most else 0)
            assert majority_at_k(counts, scores, n, k) == pytest.approx(np.mean(draws)), (counts, k)


def test_majority_of_many_samples_is_drawn(monkeypatch):
    counts, scores = [20, 18, 9, 1, 1], [0, 1, 0, 0, 1]
    exact = [majority_at_k(counts, scores, 60, k) for k in (1, 7, 30, 60)]
    monkeypatch.setattr(intervals, "MAX_COUNTED", 10)
    drawn = [majority_at_k(counts, scores, 60, k) for k in (1, 7, 30, 60)]
    assert drawn == [majority_at_k(counts, scores, 60, k) for k in (1, 7, 30, 60)]
    assert drawn != exact and drawn == pytest.approx(exact, abs=0.03)
    assert majority_at_k([900, 100], [1, 0], 1000, 500) == 1
    assert majority_at_k([], [], 1000, 500) == 0


@pytest.mark.parametrize(
    "true, se, sp, n, labelled",
    [
        (0.1, 0.9, 0.95, 300, 100),
        (0.02, 0.8, 0.97, 300, 60),
        (0.5, 0.7, 0.8, 200, 50),
        (0.9, 0.95, 0.9, 200, 40),
        (0.0, 0.9, 0.95, 200, 100),
        (1.0, 0.9, 0.95, 200, 100),
    ],
)
def test_the_judges_errors_are_in_the_interval(true, se, sp, n, labelled):
    rng = np.random.default_rng(2)
    covered = judged_alone = 0
    runs = 1000
    for _ in range(runs):
        flagged = rng.binomial(n, true * se + (1 - true) * (1 - sp))
        right = rng.binomial(labelled, se), rng.binomial(labelled, sp)
        result = rogan_gladen(
            flagged / n, n, sensitivity=(right[0], labelled), specificity=(right[1], labelled)
        )
        assert 0 <= result.low <= result.rate <= result.high <= 1
        covered += result.low <= true <= result.high
        judged_alone += wilson(flagged, n).low <= true <= wilson(flagged, n).high
    assert covered / runs > 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs)
    assert judged_alone < covered  # the uncorrected rate misses more often


def test_a_perfect_judge_corrects_nothing():
    many = 10**7
    result = rogan_gladen(0.3, 1000, sensitivity=(many, many), specificity=(many, many))
    plain = wilson(300, 1000)
    assert result.rate == pytest.approx(0.3)
    assert (result.low, result.high) == pytest.approx((plain.low, plain.high), abs=1e-3)


def test_refusals():
    ok = (9, 10)
    cases = [
        (lambda: compare([1, 0], [1]), "b: expected 2 scores as in a, got 1"),
        (lambda: compare([1, math.nan], [1, 0]), "a: expected finite scores, got nan at 1"),
        (lambda: compare([], []), r"a: expected a list of scores, got shape \(0,\)"),
        (lambda: compare([1, 0], [1, 0], clusters=["x"]), "clusters: expected 2 names, got 1"),
        (lambda: compare([1, 0], [1, 0], confidence=95), "confidence: expected .* got 95"),
        (lambda: wilson(3, 2), "successes: expected 0 to 2, got 3"),
        (lambda: pass_at_k(3, 1, 4), "k: expected 1 to 3, got 4"),
        (lambda: majority_at_k([2], [1], 3, 4), "k: expected 1 to 3, got 4"),
        (lambda: majority_at_k([2, 2], [1, 0], 3, 1), "sum of counts: expected 0 to 3, got 4"),
        (lambda: items_needed(0, 1), "difference: expected a number other than 0"),
        (lambda: mean_mde(10, 1, power=1), "power: expected a number between 0 and 1, got 1"),
        (lambda: rate_mde(10, 0.5, power=0), "power: expected a number between 0 and 1"),
        (lambda: rate_mde(0, 0.5), "n: expected 1 or more, got 0"),
        (lambda: mcnemar_items_needed(0.2, 0.2), "wins: expected another share than losses"),
        (lambda: holm([1.5]), "p: expected 0 to 1, got 1.5"),
        (
            lambda: rogan_gladen(0.2, 10, sensitivity=(5, 10), specificity=(5, 10)),
            r"judge: expected sensitivity \+ specificity above 1, got 5/10 \+ 5/10 = 1.000",
        ),
        (lambda: rogan_gladen(1.2, 10, sensitivity=ok, specificity=ok), "rate: expected 0 to 1"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
