"""The scores of tasks as charts of report.html."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from fastlm.evals.measures import HEADLINE
from fastlm.evals.tables import comparisons, short_names, written_measure
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

_ROW = 0.28  # inches of a line of a chart


def scores_chart(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Draw the share of right answers per task and model with its 95 % interval, and chance."""
    figure, axes = _rows([task["name"] for task in tasks], "right answers, %")
    models = list(tasks[0]["models"])
    short = short_names(models)
    for (i, name), color in zip(enumerate(models), cycle(CURVES if len(models) > 1 else (BLUE,))):
        shift = 0.5 * ((i + 0.5) / len(models) - 0.5)
        points = []
        for y, task in enumerate(tasks):
            measures = task["models"][name]["measures"]
            shown = measures.get("acc_olmes") or measures.get(written_measure(measures))
            if shown is not None:
                error = shown["error"]
                half = 0.0 if error is None else 100 * Z95 * error
                points.append((100 * shown["value"], y + shift, half))
        if points:
            x, y, half = zip(*points)
            axes.errorbar(
                x,
                y,
                xerr=half,
                fmt="o",
                color=color,
                markersize=4,
                linewidth=1.2,
                label=short[name],
            )
    known = [(100 * t["chance"], y) for y, t in enumerate(tasks) if t["chance"] is not None]
    if known:
        axes.plot(*zip(*known), "|", color=SOFT, markersize=11, label="chance")
    axes.set_xlim(0, 100)
    legend(axes)
    return as_svg(figure)


def differences_chart(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Draw how many bits per byte, in percent, each model needs less or more than the first."""
    found = [(t, one) for t, one in comparisons(tasks) if one["measure"] == HEADLINE]
    base = {t["name"]: t["models"][one["with"]]["measures"][HEADLINE]["value"] for t, one in found}
    names = list(dict.fromkeys(t["name"] for t, _ in found))
    models = list(dict.fromkeys(one["model"] for _, one in found))
    short = short_names(list(found[0][0]["models"]))
    first = short[found[0][1]["with"]]
    figure, axes = _rows(names, f"bits per byte against {first}, %")
    for (i, name), color in zip(enumerate(models), cycle((ORANGE, *CURVES[1:]))):
        shift = 0.5 * ((i + 0.5) / len(models) - 0.5)
        for t, one in found:
            if one["model"] != name:
                continue
            scale, y = 100 / base[t["name"]], names.index(t["name"]) + shift
            if one["low"] is not None:
                axes.plot([scale * one["low"], scale * one["high"]], [y, y], color=color, lw=1.4)
            axes.plot([scale * one["difference"]], [y], "o", color=color, markersize=4)
        axes.plot([], [], "o-", color=color, label=short[name])
    axes.axvline(0, color=SOFT, linewidth=1)
    legend(axes)
    return as_svg(figure)


def _rows(names: Sequence[str], label: str) -> tuple[Any, Any]:
    """Axes with a line per name, the first on top."""
    figure, axes = new_axes(label, "")
    figure.set_size_inches(SIZE[0], max(SIZE[1] / 2, 0.9 + _ROW * len(names)))
    axes.set_yticks(range(len(names)), names, fontsize=FONT)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.margins(x=0.05)
    return figure, axes
