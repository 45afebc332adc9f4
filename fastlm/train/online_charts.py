"""Charts of trainings that learn from their own answers (PPO, GRPO)."""

from typing import Any

from fastlm.pipeline.charts import (
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    SOFT,
    as_svg,
    legend,
    new_axes,
    running_mean,
)

Metrics = list[dict[str, Any]]


def score_chart(metrics: Metrics) -> str:
    """Draw the mean score of each round's answers (pale, running mean strong) and that of greedy
    answers to held-out prompts, with its standard error.
    """
    figure, axes = new_axes("step", "score")
    x, y = _rounds(metrics, "score")
    axes.plot(x, y, color=PALE, linewidth=0.8)
    axes.plot(x, running_mean(y), color=BLUE, linewidth=2, label="rounds")
    held = [m for m in metrics if "val_score" in m]
    if held:
        axes.errorbar(
            [m["step"] for m in held], [m["val_score"] for m in held],
            [m["val_score_error"] for m in held], color=ORANGE, linewidth=1.5, marker="o",
            markersize=3.5, elinewidth=1, label="held-out ± standard error",
        )  # fmt: skip
    legend(axes)
    return as_svg(figure)


def frontier_chart(metrics: Metrics) -> str:
    """Draw score over KL, a point per round, from pale to dark (Gao et al. 2022, arXiv:2210.10760:
    score at first rises with the root of the KL; where it falls again, the reward is hacked).
    """
    figure, axes = new_axes("√KL to the reference, √nats per answer", "score")
    _, kl = _rounds(metrics, "kl3")
    steps, score = _rounds(metrics, "score")
    x = [max(value, 0.0) ** 0.5 for value in kl]
    axes.plot(x, score, color=PALE, linewidth=0.8)
    axes.scatter(x, score, 16, c=steps, cmap="Blues", vmin=-max(steps, default=1) / 2, zorder=3)
    return as_svg(figure)


def kl_chart(metrics: Metrics) -> str:
    """Draw the KL to the reference by k1, with its standard error, and by k3, which is never
    negative.
    """
    figure, axes = new_axes("step", "KL to the reference, nats per answer")
    axes.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    x, y = _rounds(metrics, "kl")
    _, error = _rounds(metrics, "kl_error")
    low, high = ([v + sign * e for v, e in zip(y, error)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=PALE, linewidth=0, alpha=0.6)
    axes.plot(x, y, color=BLUE, linewidth=2, label="k1 ± standard error")
    axes.plot(x, _rounds(metrics, "kl3")[1], color=GREEN, linewidth=1.5, label="k3")
    legend(axes)
    return as_svg(figure)


def length_chart(metrics: Metrics) -> str:
    """Draw the mean length of answers, and the share of them that ended (right axis)."""
    figure, axes = new_axes("step", "tokens per answer")
    axes.plot(*_rounds(metrics, "length"), color=BLUE, linewidth=2, label="length")
    axes.set_ylim(bottom=0)
    ended = axes.twinx()
    ended.plot(*_rounds(metrics, "ended"), color=ORANGE, linewidth=1.5)
    ended.plot(*_rounds(metrics, "repetition"), color=GREEN, linewidth=1.5)
    ended.set_ylim(-0.02, 1.02)
    ended.tick_params(colors=SOFT, labelsize=9.5, length=0)
    ended.set_ylabel("share", color=SOFT, fontsize=9.5)
    ended.spines[:].set_visible(False)
    axes.plot([], [], color=ORANGE, linewidth=1.5, label="share that ended")
    axes.plot([], [], color=GREEN, linewidth=1.5, label="repeated 4-grams")
    legend(axes)
    return as_svg(figure)


def value_chart(metrics: Metrics) -> str:
    """Draw the share of the returns' variance that the value model explains; below 0 it is worse
    than their mean.
    """
    figure, axes = new_axes("step", "explained variance of the returns")
    axes.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    x, y = _rounds(metrics, "explained_variance")
    axes.plot(x, y, color=PALE, linewidth=0.8)
    axes.plot(x, running_mean(y), color=BLUE, linewidth=2)
    axes.set_ylim(max(-2.0, min([-0.1, *y])), 1.05)  # a first round may be far below
    return as_svg(figure)


def _rounds(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """The first step of each round, and what it measured."""
    found = {m["round"]: (m["step"], m[name]) for m in reversed(metrics) if "round" in m}
    places = sorted(found.values())
    return [step for step, _ in places], [value for _, value in places]
