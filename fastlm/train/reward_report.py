"""What is measured of a reward model beside its accuracy: calibration and length bias."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 5  # of the predicted probability, from 0.5 to 1
DRAWS = 2000  # of outcomes under perfect calibration: the mean is 0.6 % of itself off, or less
EXACT = 2000  # pairs of a bin from which on how many are right is drawn from a normal distribution


def calibration(margins: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """Compare the probabilities ``sigmoid(|margin|)``, with which a model predicts the better
    answer, with how often it is right.

    Args:
        margins: score of the better answer minus score of the worse, before normalisation.

    Returns:
        "bins" that are not empty: "predicted" (mean probability), "observed" (share that is right;
        a tie is half right) and "count"; and "ece", the expected calibration error: the mean of
        ``|predicted - observed|`` weighted by count (Guo et al. 2017, arXiv:1706.04599).

        It is above 0 for a perfectly calibrated model, too: 0.11 in the mean on 40 pairs. "null"
        says what it would be if each pair were right with exactly the predicted probability,
        independently: "mean", "p95" (in 19 of 20 cases it is less), and "p", the share of such
        cases whose error is at least "ece". "excess" is "ece" minus that mean.
    """
    predicted = 1 / (1 + np.exp(-np.minimum(np.abs(np.asarray(margins, np.float64)), 700.0)))
    observed = (np.sign(np.asarray(margins, np.float64)) + 1) / 2
    index = np.minimum((predicted - 0.5) * 2 * bins, bins - 1).astype(int)
    rows, gap, null = [], 0.0, np.zeros(DRAWS)
    rng = np.random.default_rng(0)
    for i in range(bins):
        p, right = predicted[index == i], observed[index == i]
        if not len(p):
            continue
        row = {"predicted": float(p.mean()), "observed": float(right.mean()), "count": len(p)}
        rows.append(row)
        gap += len(p) * abs(row["predicted"] - row["observed"])
        null += np.abs(_drawn(p, rng) - p.sum())
    total = max(len(margins), 1)
    ece, null = gap / total, null / total
    return {
        "bins": rows, "ece": ece, "pairs": len(margins),
        "null": {
            "mean": float(null.mean()), "p95": float(np.quantile(null, 0.95)),
            "p": (1 + int((null >= ece - 1e-12).sum())) / (1 + DRAWS),
        },
        "excess": ece - float(null.mean()),
    }  # fmt: skip


def _drawn(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw `DRAWS` times how many of the pairs are right that are so with the probabilities p."""
    if len(p) > EXACT:
        return rng.normal(p.sum(), math.sqrt(float(p @ (1 - p))), DRAWS)
    return np.array([np.count_nonzero(rng.random(len(p)) < p) for _ in range(DRAWS)])


def length_bias(
    lengths: Sequence[int], scores: Sequence[float], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return "correlation" (Pearson's, of score and length; None if either is constant), and
    accuracy and number of the pairs whose better answer is "shorter" or "longer".

    Args:
        pairs: (better, worse) as indices of the answers.
    """
    found: dict[str, Any] = {"correlation": _correlation(lengths, scores)}
    sides = {
        "shorter": [(i, j) for i, j in pairs if lengths[i] < lengths[j]],
        "longer": [(i, j) for i, j in pairs if lengths[i] > lengths[j]],
    }
    for name, side in sides.items():
        right = [0.5 if scores[i] == scores[j] else scores[i] > scores[j] for i, j in side]
        found[name] = {"pairs": len(side), "accuracy": sum(right) / len(side) if side else None}
    return found


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread_x = sum((a - mean_x) ** 2 for a in x)
    spread_y = sum((b - mean_y) ** 2 for b in y)
    if not spread_x or not spread_y:
        return None
    shared = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return shared / math.sqrt(spread_x * spread_y)
