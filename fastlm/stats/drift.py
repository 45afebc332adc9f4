"""Drift between a window of traffic and a reference window: PSI of counts, MMD of vectors."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm.errors import InputError

SMOOTHING = 0.5  # added to each count, because an empty bin has no logarithm
DRAWS = 999  # simulated windows without drift


@dataclass(frozen=True)
class Drift:
    """The ``value`` of a drift measure. ``floor``: the 95th percentile of windows without drift;
    ``p``: the share of windows without drift with at least this value.
    """

    value: float
    floor: float
    p: float


def psi(reference_counts: Any, counts: Any, *, seed: int = 0) -> Drift:
    """Return the population stability index of two histograms over the same bins.

        sum over bins of (q - r) log(q / r)

    r and q are the bins' shares with 1/2 added to each count. The usual thresholds (0.1, 0.25)
    ignore the number of items: two windows of 100 items over 20 bins have a PSI of 0.4 without any
    drift. ``floor`` and ``p`` come from simulated windows of these sizes, drawn from the pooled
    shares (``seed``). p has steps of 1/1000 and is conservative if nearly all counts are 0.
    """
    r, q = _counts("reference_counts", reference_counts), _counts("counts", counts)
    if len(r) != len(q):
        raise InputError(f"counts: expected {len(r)} bins as in reference_counts, got {len(q)}")
    rng, pooled = np.random.default_rng(seed), (r + q) / (r + q).sum()
    drawn = _psi(*(rng.multinomial(int(c.sum()), pooled, DRAWS) for c in (r, q)))
    return _drift_of(float(_psi(r, q)), drawn)


def mmd(
    x: Any, y: Any, *, seed: int = 0, permutations: int = 499, bandwidth: float | None = None
) -> Drift:
    """Return the unbiased squared maximum mean discrepancy of two samples (n, d), (m, d).

    The kernel is exp(-|u - v|^2 / (2 bandwidth^2)); the bandwidth is by default the median distance
    within the pooled sample (Gretton et al. 2012). ``floor`` and ``p`` come from permutations of
    the pooled sample (``seed``). p is exact and uniform in steps of 1 / (permutations + 1) if the
    vectors are independent. Without drift ``value`` is near 0, and may be negative.

    Memory: 16 (n + m)^2 bytes. Sample windows of more than a few thousand vectors.
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    for name, a in (("x", x), ("y", y)):
        if a.ndim != 2 or len(a) < 2 or not np.isfinite(a).all() or a.shape[1] != x.shape[1]:
            raise InputError(
                f"{name}: expected two or more finite vectors, as in x {x.shape}, got {a.shape}"
            )
    pooled, n = np.concatenate([x, y]), len(x)
    pooled -= pooled.mean(axis=0)  # vectors far from 0 lose precision by cancellation
    squares = (pooled**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * pooled @ pooled.T, 0)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(distances[np.triu_indices(len(pooled), 1)])))
    elif bandwidth <= 0:
        raise InputError(f"bandwidth: expected a number above 0, got {bandwidth}")
    if bandwidth == 0 and distances.any():
        bandwidth = float(np.sqrt(distances.max()))  # more than half of the pairs are equal
    kernel = np.exp(distances / (-2 * bandwidth**2)) if bandwidth else np.ones_like(distances)
    np.fill_diagonal(kernel, 0)
    rng = np.random.default_rng(seed)
    in_x = np.zeros((permutations + 1, len(pooled)))
    in_x[0, :n] = 1
    for row in in_x[1:]:
        row[rng.permutation(len(pooled))[:n]] = 1
    values = _mmd(kernel, in_x, n)
    return _drift_of(float(values[0]), values[1:])


def _mmd(kernel: np.ndarray, in_x: np.ndarray, n: int) -> np.ndarray:
    """Return the statistic for each row of ``in_x`` (R, N): 1 for vectors assigned to x."""
    m = len(kernel) - n
    towards = in_x @ kernel  # (R, N)
    within = (towards * in_x).sum(axis=1)
    across = towards.sum(axis=1) - within
    within_y = kernel.sum() - within - 2 * across
    return within / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)


def _psi(r: np.ndarray, q: np.ndarray) -> np.ndarray:
    r, q = r + SMOOTHING, q + SMOOTHING
    r, q = r / r.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    return ((q - r) * np.log(q / r)).sum(axis=-1)


def _drift_of(value: float, drawn: np.ndarray) -> Drift:
    tie = 1e-9 * max(abs(value), float(np.abs(drawn).max()))  # the same sum, rounded differently
    p = (1 + int((drawn >= value - tie).sum())) / (1 + len(drawn))
    return Drift(value, float(np.quantile(drawn, 0.95)), p)


def _counts(name: str, counts: Any) -> np.ndarray:
    array = np.asarray(counts, dtype=np.float64)
    is_valid = np.isfinite(array).all() and (array >= 0).all() and (array == np.floor(array)).all()
    if array.ndim != 1 or len(array) < 2 or not is_valid or not array.sum():
        raise InputError(
            f"{name}: expected two or more whole numbers, not all 0, got {counts!r:.60}"
        )
    return array
