"""Scores as charts of report.html."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from fastlm.evals.measures import HEADLINE
from fastlm.evals.tables import accuracy, comparisons, is_share, main_measure, short_names
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
        points = []
        for y, task in enumerate(tasks):
            measures = task["models"][name]["measures"]
            best = accuracy(measures)
            if best is not None and is_share(main_measure(measures), best):
                half = 100 * Z95 * (best["error"] or 0.0)
                points.append((100 * best["value"], y + _shift(i, len(models)), half))
        if points:
            x, y, half = zip(*points)
            axes.errorbar(
                x, y, xerr=half, fmt="o", color=color, markersize=4, linewidth=1.2,
                label=short[name],
            )  # fmt: skip
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
        for t, one in found:
            if one["model"] != name:
                continue
            scale, y = 100 / base[t["name"]], names.index(t["name"]) + _shift(i, len(models))
            if one["low"] is not None:
                axes.plot([scale * one["low"], scale * one["high"]], [y, y], color=color, lw=1.4)
            axes.plot([scale * one["difference"]], [y], "o", color=color, markersize=4)
        axes.plot([], [], "o-", color=color, label=short[name])
    axes.axvline(0, color=SOFT, linewidth=1)
    legend(axes)
    return as_svg(figure)


def _shift(index: int, count: int) -> float:
    """Where a model's point stands beside those of others in the same line."""
    return 0.5 * ((index + 0.5) / count - 0.5)


def _rows(names: Sequence[str], label: str) -> tuple[Any, Any]:
    """Axes with a line per name, the first on top."""
    figure, axes = new_axes(label, "")
    figure.set_size_inches(SIZE[0], max(SIZE[1] / 2, 0.9 + _ROW * len(names)))
    axes.set_yticks(range(len(names)), names, fontsize=FONT)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.margins(x=0.05)
    return figure, axes


Scores = Mapping[str, Mapping[str, Any]]


def memorization_chart(scores: Scores, of: str = "") -> str | None:
    """Draw the share of texts continued to the letter over their copies, a curve per prefix."""
    pattern = r"memorization\.prefix_(?P<curve>\d+)\.copies_(?P<copies>\d+)"
    return _copies_chart(
        scores, pattern, "after {} tokens", f"copies in the training text{of}",
        "continued to the letter, %", scale=100, limits=(-3, 103),
    )  # fmt: skip


def exposure_chart(scores: Scores, of: str = "") -> str | None:
    """Draw the mean exposure of canaries over their copies."""
    pattern = r"privacy\.(?P<curve>canaries)\.copies_(?P<copies>\d+)"
    return _copies_chart(
        scores, pattern, "{}", f"copies in the training text{of}", "exposure of canaries, bits",
        scale=1, limits=(0, None),
    )  # fmt: skip


def _copies_chart(
    scores: Scores,
    pattern: str,
    label: str,
    x_label: str,
    y_label: str,
    *,
    scale: float,
    limits: tuple[float, float | None],
) -> str | None:
    """Draw scores over the copies in their names, with intervals; None where no name fits."""
    curves: dict[str, dict[int, Mapping[str, Any]]] = {}
    for key, score in scores.items():
        if found := re.fullmatch(pattern, key):
            curves.setdefault(found["curve"], {})[int(found["copies"])] = score
    if not curves:
        return None
    figure, axes = new_axes(x_label, y_label)
    for (name, points), color in zip(
        sorted(curves.items(), key=lambda c: (len(c[0]), c[0])), cycle(CURVES)
    ):
        x = sorted(points)
        value, low, high = ([scale * points[i][k] for i in x] for k in ("value", "low", "high"))
        below = [max(0.0, v - end) for v, end in zip(value, low)]
        above = [max(0.0, end - v) for v, end in zip(value, high)]
        axes.errorbar(
            x, value, yerr=[below, above], color=color, label=label.format(name), linewidth=2,
            marker="o", markersize=3.5, elinewidth=1, capsize=2,
        )  # fmt: skip
        axes.set_xticks(x, [str(copies) for copies in x])
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(x, [str(copies) for copies in x])
    axes.minorticks_off()
    axes.set_ylim(*limits)
    legend(axes)
    return as_svg(figure)
