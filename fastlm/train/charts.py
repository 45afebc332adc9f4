"""Charts of trainings on preferences and on a policy's own answers, and of reward models."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.pipeline.charts import (
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    SOFT,
    as_svg,
    legend,
    level,
    new_axes,
    noisy_curve,
    points_with_errors,
    right_axis,
    running_mean,
)

Metrics = list[dict[str, Any]]


def rewards_chart(metrics: Metrics) -> str:
    """Draw the rewards of chosen and rejected answers, running means over the steps, and the
    held-out ones.
    """
    figure, axes = new_axes("step", "reward, nats times β")
    level(axes)
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


def curve_chart(
    metrics: Metrics,
    label: str,
    name: str,
    title: str | None = None,
    *,
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """Draw what steps or rounds measured as ``name`` (each pale, running mean strong), what
    validations measured, with its standard error, and a level to compare with.
    """
    figure, axes = new_axes("step", label)
    if reference is not None:
        level(axes, reference)
    noisy_curve(axes, *_series(metrics, name), title)
    points_with_errors(axes, metrics, f"val_{name}")
    if limits is not None:
        axes.set_ylim(*limits)
    if title is not None:
        legend(axes)
    return as_svg(figure)


def accuracy_chart(metrics: Metrics) -> str:
    """Draw the share of answers that are ranked right, of training and held-out."""
    return curve_chart(
        metrics, "share ranked right", "accuracy", "training", reference=0.5, limits=(-0.02, 1.02)
    )


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


def frontier_chart(metrics: Metrics) -> str:
    """Draw score over KL, a point per round, from pale to dark (Gao et al. 2022, arXiv:2210.10760:
    score at first rises with the root of the KL; where it falls again, the reward is hacked).
    """
    figure, axes = new_axes("√KL to the reference, √nats per answer", "score")
    _, kl = _series(metrics, "kl3")
    steps, score = _series(metrics, "score")
    x = [max(value, 0.0) ** 0.5 for value in kl]
    axes.plot(x, score, color=PALE, linewidth=0.8)
    axes.scatter(x, score, 16, c=steps, cmap="Blues", vmin=-max(steps, default=1) / 2, zorder=3)
    return as_svg(figure)


def kl_chart(metrics: Metrics) -> str:
    """Draw the KL to the reference by k1, with its standard error, and by k3, which is never
    negative.
    """
    figure, axes = new_axes("step", "KL to the reference, nats per answer")
    level(axes)
    x, y = _series(metrics, "kl")
    _, error = _series(metrics, "kl_error")
    low, high = ([v + sign * e for v, e in zip(y, error)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=PALE, linewidth=0, alpha=0.6)
    axes.plot(x, y, color=BLUE, linewidth=2, label="k1 ± standard error")
    axes.plot(x, _series(metrics, "kl3")[1], color=GREEN, linewidth=1.5, label="k3")
    legend(axes)
    return as_svg(figure)


def answers_chart(metrics: Metrics) -> str:
    """Draw the mean length of answers, and the share of them that ended (right axis)."""
    figure, axes = new_axes("step", "tokens per answer")
    axes.plot(*_series(metrics, "length"), color=BLUE, linewidth=2, label="length")
    axes.set_ylim(bottom=0)
    shares = right_axis(axes, "share")
    shares.plot(*_series(metrics, "ended"), color=ORANGE, linewidth=1.5)
    shares.plot(*_series(metrics, "repetition"), color=GREEN, linewidth=1.5)
    shares.set_ylim(-0.02, 1.02)
    axes.plot([], [], color=ORANGE, linewidth=1.5, label="share that ended")
    axes.plot([], [], color=GREEN, linewidth=1.5, label="repeated 4-grams")
    legend(axes)
    return as_svg(figure)


def value_chart(metrics: Metrics) -> str:
    """Draw the share of the returns' variance that the value model explains; below 0 it is worse
    than their mean.
    """
    lowest = min([-0.1, *_series(metrics, "explained_variance")[1]])
    return curve_chart(
        metrics, "explained variance of the returns", "explained_variance", reference=0.0,
        limits=(max(-2.0, lowest), 1.05),  # a first round may be far below
    )  # fmt: skip


def _series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """The steps, or the first step of each round, and what they measured."""
    lines = {m.get("round", m["step"]): m for m in reversed(metrics) if name in m}
    series = sorted((m["step"], m[name]) for m in lines.values())
    return [step for step, _ in series], [value for _, value in series]
