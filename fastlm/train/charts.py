"""Charts of trainings, from their metrics.jsonl, and of reward models."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from fastlm.pipeline.charts import (
    BLUE,
    CURVES,
    ORANGE,
    PALE,
    SOFT,
    as_svg,
    legend,
    level,
    new_axes,
    running_mean,
)

Metrics = list[dict[str, Any]]
# label of the y axis, metrics, reference level, limits of the y axis
CHARTS: tuple[tuple[str, tuple[str, ...], float | None, tuple[float, float] | None], ...] = (
    ("reward, nats times β", ("reward_chosen", "reward_rejected"), 0.0, None),
    ("accuracy of pairs", ("accuracy",), 0.5, (-0.02, 1.02)),
    ("log odds ratio of chosen and rejected", ("log_odds",), 0.0, None),
    ("loss per token of the chosen answers", ("nll",), None, None),
    ("score", ("score",), None, None),
    ("KL to the reference, nats per completion", ("kl", "kl3"), 0.0, None),
    ("tokens per completion", ("length",), None, None),
    ("turns per completion", ("turns",), None, None),
    (
        "share of completions with EOS, of repeated 4-grams",
        ("eos_fraction", "repetition"),
        None,
        None,
    ),
    ("explained variance of the returns", ("explained_variance",), 0.0, (-2.0, 1.05)),
    ("share of groups whose scores differ", ("informative_groups",), None, (-0.02, 1.02)),
    ("prompts drawn per round", ("prompts_drawn",), None, None),
    ("entropy, nats per token", ("entropy",), None, None),
    (
        "share of tokens clipped from below, from above",
        ("clip_fraction_low", "clip_fraction_high"),
        0.0,
        None,
    ),
)
# Metrics of steps. Other metrics are equal in all steps of a round
STEP_METRICS = ("entropy", "clip_fraction_low", "clip_fraction_high")


def training_charts(metrics: Metrics) -> list[str]:
    """Draw each of `CHARTS` for which there are metrics: the running mean of steps or rounds (with
    pale single values if there is one metric), and validations as points with standard errors.
    """
    charts = []
    for label, names, reference, limits in CHARTS:
        if not any(name in line for line in metrics for name in names):
            continue
        figure, axes = new_axes("step", label)
        if reference is not None:
            level(axes, reference)
        for name, color in zip(names, (BLUE, ORANGE)):
            x, y = _series(metrics, name)
            title = name.replace("_", " ")
            if len(names) == 1:
                axes.plot(x, y, color=PALE, linewidth=0.8)
            axes.plot(x, running_mean(y), color=color, linewidth=2, label=title)
            validations = _series(metrics, f"val_{name}")
            if validations[0]:
                axes.errorbar(
                    *validations, _series(metrics, f"val_{name}_error")[1] or None, fmt="o",
                    elinewidth=1, color=ORANGE if len(names) == 1 else color, markersize=5,
                    markerfacecolor="white", label=f"{title}, held-out",
                )  # fmt: skip
        if limits is not None:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, limits[0]), min(high, limits[1]))
        legend(axes, columns=2)
        charts.append(as_svg(figure))
    return charts


def sweep_chart(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], label: str) -> str:
    """Draw a metric over the tokens seen. Each value of a sweep has a thin line per seed, their
    mean, and a band of one standard error on each side.

    ``curves``: value -> the validations of each seed, as (tokens, metric). The k-th validations of
    the seeds are averaged. The axis shows all of the curves. Of several values it shows only
    the second half, if that would take less than a quarter of it.
    """
    import numpy as np

    figure, axes = new_axes("million tokens seen", label)
    late: list[float] = []
    values: list[float] = []
    for (name, points), color in zip(curves.items(), cycle(CURVES)):
        length = min(map(len, points))
        array = np.array([curve[:length] for curve in points], np.float64).reshape(-1, length, 2)
        x, y = array[..., 0] / 1e6, array[..., 1]
        axes.plot(x.T, y.T, color=color, linewidth=0.7, alpha=0.5)
        mean_x, mean = x.mean(0), y.mean(0)
        axes.plot(mean_x, mean, color=color, linewidth=2, label=name)
        if len(y) > 1:
            error = y.std(0, ddof=1) / np.sqrt(len(y))
            axes.fill_between(
                mean_x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0
            )
        values += y.ravel().tolist()
        late += y[:, length // 2 :].ravel().tolist()
    if late and len(curves) > 1 and 0 < 4 * (max(late) - min(late)) < max(values) - min(values):
        margin = 0.1 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.locator_params(axis="x", nbins=6)  # so that small numbers do not overlap
    legend(axes, columns=2)
    return as_svg(figure)


def calibration_chart(bins: Sequence[Mapping[str, float]]) -> str:
    """Draw how often the model's prediction is right, over its predicted probability.

    Args:
        bins: "predicted", "observed" and "count" of each bin.
    """
    figure, axes = new_axes("predicted probability", "observed share")
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="ideal")
    max_count = max((b["count"] for b in bins), default=1)
    x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    error = [(b["observed"] * (1 - b["observed"]) / b["count"]) ** 0.5 for b in bins]
    axes.errorbar(x, y, error, color=BLUE, linewidth=1.5, elinewidth=1, label="held-out")
    areas = [20 + 100 * b["count"] / max_count for b in bins]
    axes.scatter(x, y, areas, color=BLUE, zorder=3)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.02, 1.02)
    legend(axes)
    return as_svg(figure)


def frontier_chart(metrics: Metrics) -> str:
    """Draw score over KL, one point per round, from pale to dark. The score at first rises with the
    root of the KL; if it falls again, the policy hacks the reward (Gao et al. 2022,
    arXiv:2210.10760).
    """
    figure, axes = new_axes("√KL to the reference, √nats per completion", "score")
    _, kl = _series(metrics, "kl3")
    steps, score = _series(metrics, "score")
    x = [max(value, 0.0) ** 0.5 for value in kl]
    axes.plot(x, score, color=PALE, linewidth=0.8)
    axes.scatter(x, score, 16, c=steps, cmap="Blues", vmin=-max(steps, default=1) / 2, zorder=3)
    return as_svg(figure)


def _series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and their values; of a metric of rounds, the first step of each round."""
    key = "step" if name in STEP_METRICS else "round"
    lines = {m.get(key, m["step"]): m for m in reversed(metrics) if name in m}
    series = sorted((m["step"], m[name]) for m in lines.values())
    return [step for step, _ in series], [value for _, value in series]
