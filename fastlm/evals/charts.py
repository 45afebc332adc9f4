"""Charts of evaluation scores for report.html."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from fastlm.evals.tables import (
    Tasks,
    accuracy,
    is_share,
    main_metric,
    short_names,
    table_comparisons,
)
from fastlm.evals.task_metrics import HEADLINE
from fastlm.pipeline.charts import (
    BLUE,
    CURVES,
    FONT,
    LINE,
    ORANGE,
    SIZE,
    SOFT,
    as_svg,
    legend,
    new_axes,
)
from fastlm.stats.intervals import Z95

_ROW = 0.28  # inches of a row of a chart
Point = tuple[int, float, float, float]  # row of the chart, value, low and high


def scores_chart(tasks: Tasks) -> str:
    """Draw the share of right answers per task and model with its 95 % interval, and chance."""
    points: dict[str, list[Point]] = {name: [] for name in tasks[0]["models"]}
    for row, task in enumerate(tasks):
        for name, model in task["models"].items():
            best = accuracy(model["metrics"])
            if best is not None and is_share(main_metric(model["metrics"]), best):
                value, half = 100 * best["value"], 100 * Z95 * (best["error"] or 0.0)
                points[name].append((row, value, value - half, value + half))
    colors = CURVES if len(points) > 1 else (BLUE,)
    figure, axes = _rows([task["name"] for task in tasks], "right answers, %", points, colors)
    chances = [(100 * t["chance"], y) for y, t in enumerate(tasks) if t["chance"] is not None]
    if chances:
        axes.plot(*zip(*chances), "|", color=SOFT, markersize=11, label="chance")
    axes.set_xlim(0, 100)
    legend(axes)
    return as_svg(figure)


def difference_charts(tasks: Tasks) -> list[str]:
    """Draw the difference in bits per byte between each model and the first, in percent. Without
    such a comparison there is no chart."""
    points: dict[str, list[Point]] = {}
    names: list[str] = []
    for task, comparison in table_comparisons(tasks):
        if comparison["metric"] == HEADLINE:
            names += [task["name"]] if task["name"] not in names else []
            scale = 100 / task["models"][comparison["baseline"]]["metrics"][HEADLINE]["value"]
            value = comparison["difference"]
            ends = (
                (value, value)
                if comparison["low"] is None
                else (comparison["low"], comparison["high"])
            )
            point = (names.index(task["name"]), *(scale * x for x in (value, *ends)))
            points.setdefault(comparison["model"], []).append(point)
    if not points:
        return []
    first = next(iter(short_names([*tasks[0]["models"]]).values()))
    label = f"bits per byte against {first}, %"
    figure, axes = _rows(names, label, points, (ORANGE, *CURVES[1:]))
    axes.axvline(0, color=SOFT, linewidth=1)
    legend(axes)
    return [as_svg(figure)]


def _rows(
    names: Sequence[str],
    label: str,
    points: Mapping[str, Sequence[Point]],
    colors: Sequence[str],
) -> tuple[Any, Any]:
    """Return axes with a row per name, the first on top, and the models' points side by side."""
    figure, axes = new_axes(label, "")
    figure.set_size_inches(SIZE[0], max(SIZE[1] / 2, 0.9 + _ROW * len(names)))
    axes.set_yticks(range(len(names)), names, fontsize=FONT)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.margins(x=0.05)
    short = short_names([*points])
    for (i, (model, model_points)), color in zip(enumerate(points.items()), cycle(colors)):
        if model_points:
            rows, *values = zip(*model_points)
            shift = 0.5 * ((i + 0.5) / len(points) - 0.5)
            y = [row + shift for row in rows]
            _errorbar(axes, values, color, short[model], y=y, fmt="o", linewidth=1.2)
    return figure, axes


def _errorbar(
    axes: Any, values: Sequence[Sequence[float]], color: str, label: str, **options: Any
) -> None:
    """Draw values with their intervals: along x if ``options`` has y, else along y."""
    value, low, high = values
    errors = [[max(0.0, v - end) for v, end in zip(value, low)],
              [max(0.0, end - v) for v, end in zip(value, high)]]  # fmt: skip
    along = {"x": value, "xerr": errors} if "y" in options else {"y": value, "yerr": errors}
    axes.errorbar(**along, **options, color=color, label=label, markersize=4)


def copies_charts(scores: Mapping[str, Mapping[str, Any]], suffix: str = "") -> list[str]:
    """Draw memorization over the number of copies in the training text: the share of texts that the
    model continues verbatim, with a curve per prefix length, and the mean exposure of canaries. A
    chart without scores is left out."""
    kinds = (
        (r"memorization\.prefix_(\d+)", "after {} tokens", "continued verbatim, %", 100),
        (r"privacy\.(canaries)", "{}", "exposure of canaries, bits", 1),
    )
    charts = []
    for pattern, label, y_label, scale in kinds:
        curves: dict[str, dict[int, Mapping[str, Any]]] = {}
        for key, score in scores.items():
            if match := re.fullmatch(rf"{pattern}\.copies_(\d+)", key):
                curves.setdefault(match[1], {})[int(match[2])] = score
        if not curves:
            continue
        figure, axes = new_axes(f"copies in the training text{suffix}", y_label)
        curves = dict(sorted(curves.items(), key=lambda curve: (len(curve[0]), curve[0])))
        for (name, points), color in zip(curves.items(), cycle(CURVES)):
            x = sorted(points)
            values = [[scale * points[i][key] for i in x] for key in ("value", "low", "high")]
            _errorbar(axes, values, color, label.format(name), x=x, marker="o", capsize=2)
        axes.set_xscale("symlog", base=2, linthresh=1)
        x = sorted({copies for points in curves.values() for copies in points})
        axes.set_xticks(x, [str(copies) for copies in x])
        axes.minorticks_off()
        axes.set_ylim(*((-3, 103) if scale == 100 else (0, None)))
        legend(axes)
        charts.append(as_svg(figure))
    return charts
