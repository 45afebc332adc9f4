"""Charts of report.html as SVG from matplotlib, so that they stay sharp and their numbers can be
searched. The alternative was a page of JavaScript charts; it would have to embed or fetch its
library.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from fastlm.pipeline.text import count_text

INK, SOFT, LINE = "#1c2733", "#5d6b7a", "#dfe4ea"
BLUE, PALE, ORANGE, GREEN = "#2f6fde", "#b9cdf3", "#d9822b", "#2e8b6a"
CURVES = (ORANGE, GREEN, BLUE, "#8a4fbf", "#b3452f")  # one per model, then from the first again
# Inches of a chart: as wide as a phone shows it, so that its text keeps its size there. On a large
# screen it takes half of the page
SIZE = (4.9, 3.2)
FONT = 9.5  # points
LEGEND_WIDTH = 62  # characters that fit into SIZE
LABEL_HEIGHT = 13.0  # points: a line of FONT plus spacing
MAX_LABELS = 10  # of bars, in the width of SIZE
SMOOTHING = 0.05  # share of the run: width of the running mean over the noisy training loss


def loss_chart(metrics: list[dict[str, Any]], label: str = "loss, nats per token") -> str:
    """Draw training loss (each step pale, running mean strong) and held-out loss over tokens
    seen.
    """
    steps = [m for m in metrics if "loss" in m]
    tokens = {m["step"]: m["tokens"] / 1e6 for m in steps} | {0: 0.0}
    figure, axes = new_axes("million tokens seen", label)
    x, y = [tokens[m["step"]] for m in steps], [m["loss"] for m in steps]
    noisy_curve(axes, x, y, "running mean", each="training, each step")
    held_out = [(tokens[m["step"]], m["val_loss"]) for m in metrics if "val_loss" in m]
    if held_out:
        axes.plot(
            *zip(*held_out),
            color=ORANGE,
            linewidth=1.5,
            marker="o",
            markersize=3.5,
            label="held-out",
        )
    rates = right_axis(axes, "learning rate (grey)")
    rates.plot(x, [m["lr"] for m in steps], color=LINE, linewidth=1.5, zorder=0)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="plain")
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    legend(axes)
    return as_svg(figure)


def legend(axes: Any, columns: int = 3) -> None:
    """Name the curves above the axes, in at most this many columns."""
    handles, labels = axes.get_legend_handles_labels()
    width = max(map(len, labels), default=0) + 6  # of a column with its line, in characters
    columns = max(1, min(columns, LEGEND_WIDTH // width))
    labels = [textwrap.fill(label, LEGEND_WIDTH - 6) for label in labels]
    axes.legend(
        handles, labels, frameon=False, fontsize=FONT, labelcolor=INK, loc="lower left",
        bbox_to_anchor=(-0.02, 1), ncols=columns, columnspacing=1.2, handlelength=1.4, borderpad=0,
    )  # fmt: skip


def level(axes: Any, value: float = 0.0) -> None:
    """Draw a dashed line at a value that curves are compared with."""
    axes.axhline(value, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))


def noisy_curve(
    axes: Any, x: list[Any], y: list[float], label: str | None = None, each: str | None = None
) -> None:
    """Draw each value pale and their running mean strong; ``each`` names the pale one."""
    axes.plot(x, y, color=PALE, linewidth=0.8, label=each)
    axes.plot(x, running_mean(y), color=BLUE, linewidth=2, label=label)


def right_axis(axes: Any, label: str) -> Any:
    """Return axes with the same x and their own y, on the right."""
    right = axes.twinx()
    right.tick_params(colors=SOFT, labelsize=FONT, length=0)
    right.set_ylabel(label, color=SOFT, fontsize=FONT)
    right.spines[:].set_visible(False)
    return right


def bits_figure(
    curves: Mapping[str, list[dict[str, Any]]],
    models: Mapping[str, float],
    packed: Mapping[str, float],
) -> Any:
    """Draw held-out bits per byte during training, one curve per model, and the compressors' lines.

    Args:
        curves: model -> the lines of its metrics.jsonl.
        models: model -> its bits per byte at the end.
        packed: compressor -> its bits per byte of the same text.
    """
    figure, axes = new_axes("million tokens seen", "held-out bits per byte")
    labels, first_values = [], []
    for (name, metrics), color in zip(curves.items(), cycle(CURVES)):
        # tokens, not minutes: the same curve on every machine, and a pause is no plateau
        tokens = {m["step"]: m["tokens"] / 1e6 for m in metrics if "loss" in m} | {0: 0.0}
        held_out = [
            (tokens[m["step"]], m["bits_per_byte"]) for m in metrics if "bits_per_byte" in m
        ]
        if held_out:
            axes.plot(*zip(*held_out), color=color, linewidth=2, marker="o", markersize=3.5)
            axes.plot([held_out[-1][0]], [models[name]], "o", color=BLUE, markersize=5)
            first_values.append(held_out[0][1])
        labels.append((name, models[name], BLUE if len(curves) == 1 else color))
    for name, value in packed.items():
        level(axes, value)
        labels.append((name, value, SOFT))
    values = [value for _, value, _ in labels]
    top = max(values)
    # an untrained model starts near 3 bits per byte or higher: the axis shows where it
    # crosses the lines, and also the start unless that is far above them
    first = min(max(first_values), 2 * top) if first_values else top
    axes.set_ylim(min(values) - 0.15 * top, max(1.6 * top, 1.04 * first))
    _label_values(axes, labels)
    return figure


def bar_chart(labels: Sequence[str], values: Sequence[float], x_label: str, y_label: str) -> str:
    """Draw one bar per label. Of many labels some are left out, so that they do not touch."""
    figure, axes = new_axes(x_label, y_label)
    axes.bar(range(len(values)), values, color=BLUE, width=0.86)
    step = -(-len(labels) // MAX_LABELS)
    axes.set_xticks(range(0, len(labels), step), labels[::step], parse_math=False)
    axes.yaxis.set_major_formatter(lambda value, _: count_text(value))
    axes.locator_params(axis="y", nbins=5, integer=True)
    return as_svg(figure)


def _label_values(axes: Any, labels: list[tuple[str, float, str]]) -> None:
    """Write (name, value, color) to the right of the axes, where there is no curve. Each label is
    at the height of its value or, where two would touch, as near to it as their order allows, with
    a line to the value.
    """
    axes.figure.draw_without_rendering()  # the layout decides how high the axes are
    to_points = 72 / axes.figure.dpi
    labels = sorted(labels, key=lambda label: label[1])
    heights = [axes.transData.transform((0, value))[1] * to_points for _, value, _ in labels]
    for (name, value, color), y, at in zip(labels, _apart(heights, LABEL_HEIGHT), heights):
        axes.annotate(
            f"{name} {value:.3f}", (1, value), (9, y - at), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", va="center", color=color, fontsize=FONT,
            annotation_clip=False, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1,
                        "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


def _apart(heights: list[float], gap: float) -> list[float]:
    """Return the ascending ``heights``, moved as little as keeps neighbours ``gap`` apart."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    shifts = gap * np.arange(len(heights))
    return (isotonic_regression(heights - shifts).x + shifts).tolist()


def new_axes(x_label: str, y_label: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=FONT, length=0)
    axes.set_xlabel(x_label, color=SOFT, fontsize=FONT)
    axes.set_ylabel(y_label, color=SOFT, fontsize=FONT)
    axes.margins(x=0.01)
    return figure, axes


def as_svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Any: rc_context expects its keys as literals
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "fastlm", "font.family": "sans-serif",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" class="chart" ', 1)


def running_mean(values: list[float]) -> list[float]:
    import numpy as np

    width = max(1, int(SMOOTHING * len(values)))
    sums, end = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return ((sums[end] - sums[start]) / (end - start)).tolist()
