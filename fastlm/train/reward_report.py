"""What is measured of a reward model beside its accuracy: calibration and length bias."""

import math
from collections.abc import Sequence
from typing import Any

BINS = 5  # of the predicted probability, from 0.5 to 1


def calibration(margins: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """Compare the probabilities ``sigmoid(|margin|)``, with which a model predicts the better
    answer, with how often it is right.

    Args:
        margins: score of the better answer minus score of the worse, before normalisation.

    Returns:
        "bins" that are not empty: "predicted" (mean probability), "observed" (share that is right;
        a tie is half right) and "count"; and "ece", the expected calibration error: the mean of
        ``|predicted - observed|`` weighted by count (Guo et al. 2017, arXiv:1706.04599).
    """
    groups: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for margin in margins:
        predicted = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        observed = 0.5 if margin == 0 else float(margin > 0)
        groups[min(int((predicted - 0.5) * 2 * bins), bins - 1)].append((predicted, observed))
    found = [
        {
            "predicted": sum(p for p, _ in group) / len(group),
            "observed": sum(o for _, o in group) / len(group),
            "count": len(group),
        }
        for group in groups
        if group
    ]
    gap = sum(b["count"] * abs(b["predicted"] - b["observed"]) for b in found)
    return {"bins": found, "ece": gap / max(len(margins), 1), "pairs": len(margins)}


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
