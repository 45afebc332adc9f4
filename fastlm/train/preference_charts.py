"""Charts of preference training and of reward models."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.pipeline.charts import (
    BLUE,
    GREEN,
    LINE,
    ORANGE,
    PALE,
    SOFT,
    as_svg,
    legend,
    new_axes,
    running_mean,
)


def rewards_chart(metrics: list[dict[str, Any]]) -> str:
    """Draw the rewards of chosen and rejected answers, running means over the steps, and the
    held-out ones.
    """
    figure, axes = new_axes("step", "reward, nats times β")
    axes.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    for side, color in (("chosen", BLUE), ("rejected", ORANGE)):
        steps = [m for m in metrics if f"reward_{side}" in m]
        if steps:
            values = running_mean([m[f"reward_{side}"] for m in steps])
            axes.plot([m["step"] for m in steps], values, color=color, linewidth=2, label=side)
        held = [m for m in metrics if f"val_reward_{side}" in m]
        if held:
            axes.plot(
                [m["step"] for m in held], [m[f"val_reward_{side}"] for m in held], "o",
                color=color, markersize=5, markerfacecolor="white", label=f"{side}, held-out",
            )  # fmt: skip
    legend(axes, columns=2)
    return as_svg(figure)


def accuracy_chart(metrics: list[dict[str, Any]]) -> str:
    """Draw the share of answers that are ranked right: of training (each step pale, running mean
    strong) and held-out, with its standard error.
    """
    figure, axes = new_axes("step", "share ranked right")
    steps = [m for m in metrics if "accuracy" in m]
    x, y = [m["step"] for m in steps], [m["accuracy"] for m in steps]
    axes.axhline(0.5, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(x, y, color=PALE, linewidth=0.8)
    axes.plot(x, running_mean(y), color=BLUE, linewidth=2, label="training")
    held = [m for m in metrics if "val_accuracy" in m]
    if held:
        axes.errorbar(
            [m["step"] for m in held], [m["val_accuracy"] for m in held],
            [m["val_accuracy_error"] for m in held], color=ORANGE, linewidth=1.5, marker="o",
            markersize=3.5, elinewidth=1, label="held-out ± standard error",
        )  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    legend(axes)
    return as_svg(figure)


def calibration_chart(bins: Sequence[Mapping[str, float]]) -> str:
    """Draw how often the better answer is the one that the model predicts with a probability.

    Args:
        bins: "predicted", "observed" and "count" of each.
    """
    figure, axes = new_axes("predicted probability", "observed share")
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="ideal")
    most = max((b["count"] for b in bins), default=1)
    x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    error = [(b["observed"] * (1 - b["observed"]) / b["count"]) ** 0.5 for b in bins]
    axes.errorbar(x, y, error, color=BLUE, linewidth=1.5, elinewidth=1, label="held-out")
    areas = [20 + 100 * b["count"] / most for b in bins]
    axes.scatter(x, y, areas, color=BLUE, zorder=3)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.02, 1.02)
    legend(axes)
    return as_svg(figure)


def length_chart(lengths: Sequence[int], scores: Sequence[float]) -> str:
    """Draw scores over the lengths of answers, with the line of least squares."""
    import numpy as np

    figure, axes = new_axes("tokens of the answer", "score")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.scatter(lengths, scores, 9, color=GREEN, alpha=0.5, linewidths=0, label="answers")
    if len(set(lengths)) > 1:
        slope, start = np.polyfit(lengths, scores, 1)
        ends = np.array([min(lengths), max(lengths)])
        label = f"{100 * slope:+.2f} per 100 tokens"
        axes.plot(ends, start + slope * ends, color=ORANGE, linewidth=2, label=label)
    legend(axes)
    return as_svg(figure)
