"""Sequential tests of two arms: false alarms stay below alpha, differences are detected."""

import math

import numpy as np
import pytest

from fastlm.errors import InputError
from fastlm.stats.sequential import SequentialTest, compare_rates

STREAMS = 300
ALPHA = 0.05


def arms(rng, rate_a: float, rate_b: float, share: float, looks: int):
    """Return the counts of two arms after each of ``looks`` observations."""
    to_a = rng.random(looks) < share
    passed = rng.random(looks) < np.where(to_a, rate_a, rate_b)
    return (np.cumsum(x).tolist() for x in (to_a & passed, to_a, ~to_a & passed, ~to_a))


def pvalues(*counts) -> list[float]:
    """Return `compare_rates`' p-value at every look, by its formula: this is faster."""
    from fastlm.stats.sequential import _log_beta, _log_rate

    result = []
    for s_a, n_a, s_b, n_b in zip(*counts):
        mixed = sum(
            _log_beta(s + 0.5, n - s + 0.5) - math.log(math.pi) for s, n in ((s_a, n_a), (s_b, n_b))
        )
        pooled = (s_a + s_b) / (n_a + n_b)
        result.append(math.exp(_log_rate((s_a + s_b, n_a + n_b), pooled) - mixed))
    return result


@pytest.mark.parametrize("rate, share", [(0.5, 0.5), (0.5, 0.1), (0.03, 0.5)])
def test_equal_arms_seldom_alarm_however_often_one_looks(rate, share):
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(STREAMS):
        alarms += min(pvalues(*arms(rng, rate, rate, share, 500))) <= ALPHA
    assert alarms / STREAMS <= ALPHA


def test_a_test_that_is_not_sequential_alarms_far_too_often():
    """For comparison: the same streams with a fixed-size p-value."""
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(STREAMS):
        s_a, n_a, s_b, n_b = (np.array(x) for x in arms(rng, 0.5, 0.5, 0.5, 500))
        late = np.minimum(n_a, n_b) >= 20
        s_a, n_a, s_b, n_b = (x[late] for x in (s_a, n_a, s_b, n_b))
        pooled = (s_a + s_b) / (n_a + n_b)
        error = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
        alarms += bool((np.abs(s_a / n_a - s_b / n_b) > 1.96 * error).any())
    assert alarms / STREAMS > 3 * ALPHA


def test_a_difference_of_a_tenth_is_found():
    """Rates 0.6 and 0.5: within 2,710 observations over two equal arms in four of five streams."""
    rng = np.random.default_rng(1)
    sample_sizes = missed = 0
    for _ in range(100):
        counts = [list(c) for c in arms(rng, 0.6, 0.5, 0.5, 2710)]
        sample_sizes += min(pvalues(*counts)) <= ALPHA
        answer = compare_rates(*(c[-1] for c in counts))
        missed += not answer.low <= 0.1 <= answer.high
    assert sample_sizes / 100 >= 0.68  # 0.8 less three errors of 100 streams
    assert missed / 100 <= ALPHA


@pytest.mark.parametrize(
    "counts",
    [(60, 100, 50, 100), (10, 10, 0, 10), (0, 5, 0, 50), (1, 1, 0, 0), (0, 0, 0, 0), (7, 9, 1, 90)],
)
def test_interval_pvalue_and_swap_agree(counts):
    s_a, n_a, s_b, n_b = counts
    there, back = compare_rates(*counts), compare_rates(s_b, n_b, s_a, n_a)
    assert there.p == pytest.approx(back.p) and 0 < there.p <= 1
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-6)
    assert -1 <= there.low <= there.difference <= there.high <= 1
    if 0 not in (n_a, n_b):
        assert there.p == pytest.approx(min(1, pvalues(*([x] for x in counts))[0]))
        for alpha in (there.p * 0.99, min(0.99, there.p * 1.01)):
            low, high = compare_rates(*counts, alpha=alpha)[1:3]
            assert (low <= 0 <= high) == (there.p > alpha)


def test_the_interval_holds_the_difference_at_every_look():
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(40):
        counts = list(zip(*arms(rng, 0.9, 0.6, 0.3, 150)))
        answers = [compare_rates(*c) for c in counts[::30]]
        missed += any(not a.low <= 0.3 <= a.high for a in answers)
    assert missed / 40 <= ALPHA


@pytest.mark.parametrize("kind", ["binary", "graded"])
def test_pairs_of_equal_models_seldom_alarm(kind):
    rng = np.random.default_rng(2)
    alarms, length = 0, 100 if kind == "binary" else 40
    for _ in range(STREAMS):
        test = SequentialTest(alpha=ALPHA)
        scores = rng.random((length, 2))
        if kind == "binary":
            scores = scores < 0.5
        pvalues = []
        for new, old in scores:
            test.add(float(new), float(old))
            pvalues.append(test.p)
        alarms += min(pvalues) <= ALPHA
    assert alarms / STREAMS <= ALPHA


def test_pairs_find_a_difference_of_a_tenth():
    """Rates 0.6 and 0.5: within 730 pairs in four of five streams."""
    rng = np.random.default_rng(3)
    counts = 0
    for _ in range(50):
        test = SequentialTest(alpha=ALPHA)
        early = False
        for new, old in zip(rng.random(730) < 0.6, rng.random(730) < 0.5):
            test.add(float(new), float(old))
            early = early or (test.n % 5 == 0 and test.p <= ALPHA)
        answer = test.result()
        assert answer.low <= 0.1 <= answer.high and answer.p == test.p
        assert (answer.p <= ALPHA) == (answer.low >= 0) or abs(answer.low) <= 0.005
        counts += early
    assert counts / 50 >= 0.63  # 0.8 less three errors of 50 streams


@pytest.mark.parametrize("pair", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 0.2)])
def test_pairs_are_symmetric_and_close_in_on_their_mean(pair):
    there, back = SequentialTest(), SequentialTest()
    for _ in range(2000):
        there.add(*pair)
        back.add(*pair[::-1])
    answer, swapped = there.result(), back.result()
    assert answer.p == pytest.approx(swapped.p)
    assert (answer.low, answer.high) == pytest.approx((-swapped.high, -swapped.low))
    assert answer.low <= pair[0] - pair[1] <= answer.high and answer.high - answer.low < 0.05


def test_the_start_and_refusals():
    assert SequentialTest().result() == (0, -1, 1, 1)
    with pytest.raises(InputError, match="new: expected 0 to 1, got 2"):
        SequentialTest().add(2, 0)
    with pytest.raises(InputError, match="alpha: expected a number between 0 and 1, got 5"):
        SequentialTest(alpha=5)
    with pytest.raises(InputError, match="successes_b: expected 0 to 3, got 4"):
        compare_rates(1, 2, 4, 3)
