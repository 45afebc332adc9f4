"""Drift: p-values are uniform without drift, and a shift is detected."""

import numpy as np
import pytest
from test_statistics import assert_uniform

from fastlm.errors import InputError
from fastlm.stats.drift import mmd, psi

RUNS = 300


def test_psi_without_drift_is_at_its_floor():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(10))
    results = [
        psi(rng.multinomial(2000, shares), rng.multinomial(300, shares), seed=i)
        for i in range(RUNS)
    ]
    assert_uniform([r.p for r in results])
    above = np.mean([r.value > r.floor for r in results])
    assert abs(above - 0.05) < 3 * np.sqrt(0.05 * 0.95 / RUNS)
    assert all(r.value >= 0 and (r.p <= 0.06 or r.value <= r.floor) for r in results)


def test_psi_finds_a_shift_and_its_floor_falls_with_the_counts():
    reference = np.array([500, 300, 150, 50])
    moved = psi(reference, [60, 60, 50, 30])
    assert moved.p == 0.001 and moved.value > moved.floor
    few, many = psi([5, 3, 2], [5, 3, 2]), psi([5000, 3000, 2000], [5000, 3000, 2000])
    assert few.value == many.value == 0 and few.p == many.p == 1
    # under the null it is about (1/n + 1/m) chi^2 with 2 degrees: 5.99 is its 95 % quantile
    assert many.floor == pytest.approx(2 / 10000 * 5.99, rel=0.15) and few.floor > 100 * many.floor


def test_psi_by_hand_and_with_an_empty_bin():
    r, q = np.array([8.5, 2.5]) / 11, np.array([0.5, 10.5]) / 11
    assert psi([8, 2], [0, 10]).value == pytest.approx(((q - r) * np.log(q / r)).sum())


def test_mmd_without_drift_is_uniform_and_unbiased():
    rng = np.random.default_rng(1)
    results = [
        mmd(rng.standard_t(5, (30, 4)) + 100, rng.standard_t(5, (20, 4)) + 100, seed=i)
        for i in range(RUNS)
    ]
    assert_uniform([r.p for r in results])
    values = np.array([r.value for r in results])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(RUNS)


def test_mmd_is_its_definition():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)) + 1

    def kernel(u, v):
        return np.exp(-((u[:, None] - v) ** 2).sum(-1) / (2 * 0.7**2))

    xx, yy = kernel(x, x), kernel(y, y)
    expected = (xx.sum() - 5) / 20 + (yy.sum() - 4) / 12 - 2 * kernel(x, y).mean()
    assert mmd(x, y, bandwidth=0.7).value == pytest.approx(expected)


@pytest.mark.parametrize("change", ["mean", "spread"])
def test_mmd_finds_a_shift(change):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(100, 8)), rng.normal(size=(100, 8))
    y = y + 0.5 if change == "mean" else y * 2
    result = mmd(x, y)
    assert result.p == 1 / 500 and result.value > result.floor
    assert mmd(x, y) == result and mmd(x, y, permutations=99).p == 0.01


def test_mmd_of_equal_vectors():
    same = np.ones((6, 2))
    assert mmd(same, same).p == 1
    mostly = np.zeros((40, 1))
    mostly[0] = 1  # the median distance is 0
    assert mmd(mostly, np.ones((40, 1))).p == 1 / 500


def test_refusals():
    for call, message in [
        (lambda: psi([1, 2], [1, 2, 3]), "counts: expected 2 bins as in reference_counts, got 3"),
        (lambda: psi([1, 2], [-1, 2]), r"counts: expected two or more whole numbers, .* got \[-1"),
        (lambda: psi([0, 0], [1, 2]), "reference_counts: expected two or more whole numbers"),
        (lambda: mmd([[1.0]], [[1.0], [2]]), "x: expected two or more finite vectors"),
        (lambda: mmd([[1.0]] * 2, [[1.0, 2]] * 2), r"as in x \(2, 1\), got \(2, 2\)"),
        (
            lambda: mmd([[1.0]] * 2, [[2.0]] * 2, bandwidth=-1),
            "bandwidth: expected a number above 0",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
