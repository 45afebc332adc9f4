"""Standard errors, intervals and comparisons: their rates hold in simulation, at fixed seeds."""

import itertools
import math

import numpy as np
import pytest

from fastlm.errors import InputError
from fastlm.evals.statistics import (
    compare,
    detectable,
    difference_sd,
    holm,
    items_needed,
    mean_error,
    pass_at_k,
    rate_sd,
    rogan_gladen,
    wilson,
)

PAIRS = 500
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.5)


def distance_from_uniform(pvalues: list[float]) -> float:
    """Kolmogorov and Smirnov's; 1.63 / sqrt(n) is exceeded in 1 of 100 samples."""
    p, n = np.sort(pvalues), len(pvalues)
    return float(max((np.arange(1, n + 1) / n - p).max(), (p - np.arange(n) / n).max()))


def assert_uniform(pvalues: list[float], steps: float = 0.0) -> None:
    """``steps``: half the mass of the largest step of a discrete test."""
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
    "scores, n, test",
    [
        (right_or_wrong, 400, "mcnemar"),
        (bits, 60, "sign flips"),
        (bits, 12, "sign flips"),
        (bits, 6000, "normal"),
    ],
)
def test_pvalues_are_uniform_and_intervals_cover_where_models_are_equal(scores, n, test):
    rng = np.random.default_rng(7)
    pvalues, covered = [], 0
    for _ in range(PAIRS):
        score = scores(rng, n)
        result = compare(score(), score())
        pvalues.append(result.p)
        covered += result.low <= 0 <= result.high
        assert result.test == test
    # about 170 items are right for one model only: P(exactly half of them) is 0.06
    assert_uniform(pvalues, steps=0.03 if test == "mcnemar" else 0.0)
    assert abs(covered / PAIRS - 0.95) < 3 * math.sqrt(0.05 * 0.95 / PAIRS)


@pytest.mark.parametrize("n, passages", [(200, 40)])
def test_items_of_a_passage_are_one_draw(n, passages):
    rng = np.random.default_rng(3)
    passage = np.repeat(np.arange(passages), n // passages)
    pvalues, alone = [], []
    for turn in range(PAIRS):
        lucky = rng.normal(size=passages)[passage]  # one model likes a passage more
        a, b = rng.normal(size=n) + lucky, rng.normal(size=n)
        pvalues.append(compare(a, b, clusters=passage).p)
        if turn < 100:
            alone.append(compare(a, b).p)
    assert_uniform(pvalues)
    assert (np.array(alone) <= 0.05).mean() > 0.1  # the error that clusters correct


def test_with_few_discordant_items_mcnemar_is_conservative():
    rng = np.random.default_rng(0)
    pvalues = [compare(*(rng.random((2, 20)) < 0.2)).p for _ in range(PAIRS)]
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
    assert there.difference == -back.difference and (there.low, there.high) == (
        -back.high,
        -back.low,
    )
    same = ("n", "p", "correlation", "sd", "detectable", "needed", "test")
    assert all(getattr(there, name) == pytest.approx(getattr(back, name)) for name in same)
    assert (there.mean_a, there.mean_b) == (back.mean_b, back.mean_a)
    assert there.p == back.p and 0 < there.p <= 1


def test_mcnemar_by_hand():
    a, b = [1] * 9 + [0] * 3 + [1] * 8, [0] * 9 + [1] * 3 + [1] * 8
    tail = sum(math.comb(12, k) for k in range(3)) + math.comb(12, 3) / 2
    assert compare(a, b).p == pytest.approx(2 * tail / 2**12)
    assert compare(a, b).difference == pytest.approx(6 / 20)
    assert compare(a, a).p == 1 and compare(a, a).needed is None


def test_few_differences_are_flipped_in_every_way():
    d = np.array([0.3, -0.1, 0.5, 0.2, 0.7])
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=5)]
    wanted = np.mean([s >= d.sum() - 1e-9 for s in sums])
    assert compare(d, np.zeros(5)).p == wanted


def test_equal_models_without_spread():
    result = compare([0.5, 0.25], [0.5, 0.25])
    assert (result.difference, result.low, result.high, result.p, result.sd) == (0, 0, 0, 1, 0)
    assert compare([0.5], [0.25]).sd == math.inf and compare([0.5], [0.25]).needed is None
    assert compare([1.0, 1.0], [0.5, 0.2]).correlation is None


def test_the_number_of_items_finds_the_difference_four_times_in_five():
    rng = np.random.default_rng(5)
    sd = difference_sd(rate_sd(0.6), rate_sd(0.5))
    n = items_needed(0.1, sd)
    assert detectable(n, sd) == pytest.approx(0.1, abs=1e-3) and detectable(n, sd) <= 0.1
    found = sum(compare(rng.random(n) < 0.6, rng.random(n) < 0.5).p <= 0.05 for _ in range(PAIRS))
    assert abs(found / PAIRS - 0.8) < 3 * math.sqrt(0.8 * 0.2 / PAIRS)
    assert difference_sd(0.5, 0.5, 1) == 0 and difference_sd(3, 4) == 5
    assert items_needed(9.0, 0.1) == 1


def test_mean_error():
    values = np.random.default_rng(0).normal(size=50)
    plain = mean_error(values)
    assert plain.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert mean_error(values, clusters=range(50)).error == pytest.approx(plain.error)
    five_times = mean_error(np.repeat(values, 5), clusters=np.repeat(np.arange(50), 5))
    assert five_times.error == pytest.approx(plain.error)
    assert mean_error([1.0]).error == math.inf


def test_student_matches_its_table():
    for freedom, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (120, 1.980)):
        d = np.random.default_rng(0).normal(size=freedom + 1)
        result = compare(d, np.zeros(freedom + 1))
        error = result.sd / math.sqrt(freedom + 1)
        assert (result.high - result.low) / 2 / error == pytest.approx(wanted, abs=1e-3)


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
        (lambda: compare([1, 0], [1]), "b: wanted 2 scores as in a, got 1"),
        (lambda: compare([1, math.nan], [1, 0]), "a: wanted finite scores, got nan at 1"),
        (lambda: compare([], []), r"a: wanted a list of scores, got shape \(0,\)"),
        (lambda: compare([1, 0], [1, 0], clusters=["x"]), "clusters: wanted 2 names, got 1"),
        (lambda: compare([1, 0], [1, 0], confidence=95), "confidence: wanted .* got 95"),
        (lambda: wilson(3, 2), "successes: wanted 0 to 2, got 3"),
        (lambda: pass_at_k(3, 1, 4), "k: wanted 1 to 3, got 4"),
        (lambda: items_needed(0, 1), "difference: wanted a number other than 0"),
        (lambda: detectable(10, 1, power=1), "power: wanted a number between 0 and 1, got 1"),
        (lambda: holm([1.5]), "p: wanted 0 to 1, got 1.5"),
        (
            lambda: rogan_gladen(0.2, 10, sensitivity=(5, 10), specificity=(5, 10)),
            r"judge: wanted sensitivity \+ specificity above 1, got 5/10 \+ 5/10 = 1.000",
        ),
        (lambda: rogan_gladen(1.2, 10, sensitivity=ok, specificity=ok), "rate: wanted 0 to 1"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
