"""The scores of a safety run as tables, and as a part of report.html."""

import re
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from fastlm.pipeline.charts import CURVES, as_svg, legend, new_axes
from fastlm.pipeline.stage import Part

LEGEND = (
    "Below a score that a judge decided: whose answers people labelled; with the property found,"
    " and without it passed, of how many; kappa of judge and labels (0 is chance). Elsewhere the"
    ' judge\'s error is not known. A score is corrected for it where "this model" is labelled'
    " (--labels)."
)

Scores = Mapping[str, Mapping[str, Any]]


def number(score: Mapping[str, Any], value: float) -> str:
    return f"{100 * value:.1f} %" if score["unit"] == "share" else f"{value:.2f}"


def interval(score: Mapping[str, Any]) -> str:
    return f"{number(score, score['low'])} to {number(score, score['high'])}"


def judged(score: Mapping[str, Any]) -> list[str]:
    """Return a line for each domain that the judge was measured in; none where there is no judge.
    Before them stands the judge's own share, where the value is corrected.
    """
    if "judge" not in score:
        return []
    judge = score["judge"]
    lines = [f"{100 * score['raw']:.1f} % before the correction"] * score["corrected"]
    for error in (judge, *judge.get("elsewhere", ())):
        (hit, of), (passed, rest) = error["sensitivity"], error["specificity"]
        lines.append(f"{error['domain']}: {hit}/{of}, {passed}/{rest}, kappa {error['kappa']:.2f}")
    return lines


def constructed(score: Mapping[str, Any]) -> str:
    """Return how many constructed negatives of each kind the judge passes, "" where none are."""
    kinds = score.get("judge", {}).get("kinds", {})
    return ", ".join(f"{kind} {passed}/{of}" for kind, (passed, of) in kinds.items())


def _labels(score: Mapping[str, Any]) -> str:
    judge = score.get("judge", {})
    return "; ".join(error["labels"] for error in (judge, *judge.get("elsewhere", ())) if error)


def tables(result: Mapping[str, Any]) -> Any:
    """Return what the command prints: the scores, the sets, the gates."""
    from rich.console import Group
    from rich.table import Table

    several = len(result["models"]) > 1
    parts: list[Any] = []
    for name, model in result["models"].items():
        scores = Table(box=None, pad_edge=False)
        scores.add_column("score")  # the one column that may break
        for heading in ("value", f"{100 * result['confidence']:g} % interval", "items"):
            scores.add_column(heading, justify="right", no_wrap=True)
        for key, score in model["scores"].items():
            below = "".join(f"\n  {line}" for line in judged(score))
            scores.add_row(
                f"{key}{below}", number(score, score["value"]), interval(score), f"{score['n']:,}"
            )
        parts += [f"{name}:"] if several else []
        parts.append(scores)
    if any("judge" in s for m in result["models"].values() for s in m["scores"].values()):
        parts.append(LEGEND)
    cuts = cut_lines(result)
    sets = Table("set", "licence", "source", box=None)
    for key, source in result["sets"].items():
        sets.add_row(key, source["licence"], f"{source['origin']}; {source['package']}")
    told = {text for m in result["models"].values() for s in m["scores"].values()
            if (text := constructed(s))}  # fmt: skip
    parts += [f"the judge passes, of answers constructed not to succeed: {text}" for text in told]
    parts += cuts
    if result["sets"]:
        parts += ["", sets]
    if result["gates"]:
        passed = f"all {result['gates']} gates passed"
        parts += ["", *(f"FAILED {why}" for why in result["failed"] or ())]
        parts += [] if result["failed"] else [passed]
    return Group(*parts)


def cut_lines(result: Mapping[str, Any]) -> list[str]:
    """Return a line per model and measure some of whose prompts did not fit the context."""
    several = len(result["models"]) > 1
    return [
        f"{f'{name}: ' if several else ''}{measure}: {count:,} prompts were cut at their beginning"
        " to fit the context"
        for name, model in result["models"].items()
        for measure, count in model.get("cut", {}).items()
    ]


def part(result: Mapping[str, Any]) -> Part:
    models = result["models"]
    rows = [
        {
            "model": name, "name": key, "what": s["what"], "value": number(s, s["value"]),
            "interval": interval(s), "n": s["n"], "judge": judged(s),
            "labels": "; constructed negatives that it passes: ".join(
                text for text in (_labels(s), constructed(s)) if text
            ),
            "bar": s["unit"] == "share",
            "low": 100 * s["low"], "width": 100 * (s["high"] - s["low"]), "at": 100 * s["value"],
        }
        for name, model in models.items()
        for key, s in model["scores"].items()
    ]  # fmt: skip
    charts = []
    for name, model in models.items():
        of = f" ({name})" if len(models) > 1 else ""
        if chart := memorization_chart(model["scores"], of):
            charts.append(chart)
        if chart := exposure_chart(model["scores"], of):
            charts.append(chart)
    cards = []
    if result["gates"]:
        failed = len(result["failed"])
        cards.append((f"{result['gates'] * len(models) - failed}", "safety gates passed"))
        if failed:
            cards.append((f"{failed}", "safety gates failed"))
    note = (
        f"At most {result['limit']:,} items of each set. A bar is the"
        f" {100 * result['confidence']:g} % interval, of the items alone. {LEGEND}"
    )
    values = {
        "rows": rows, "sets": result["sets"], "failed": result["failed"],
        "cut": cut_lines(result), "several": len(models) > 1, "gates": result["gates"],
    }  # fmt: skip
    return Part(
        "How safe it is", note, charts=charts, cards=cards, template="safety.html.jinja",
        values=values,
    )  # fmt: skip


def memorization_chart(scores: Scores, of: str = "") -> str | None:
    """Draw the share of texts continued to the letter over their copies, a curve per prefix."""
    curves: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for key, score in scores.items():
        if found := re.fullmatch(r"memorization\.prefix_(\d+)\.copies_(\d+)", key):
            curves.setdefault(int(found[1]), []).append((int(found[2]), score))
    if not curves:
        return None
    figure, axes = new_axes(f"copies in the training text{of}", "continued to the letter, %")
    for (length, points), color in zip(sorted(curves.items()), cycle(CURVES)):
        _curve(axes, sorted(points, key=lambda p: p[0]), color, f"after {length} tokens", 100)
    axes.set_ylim(-3, 103)
    legend(axes)
    return as_svg(figure)


def exposure_chart(scores: Scores, of: str = "") -> str | None:
    """Draw the mean exposure of canaries over their copies."""
    points = [
        (int(found[1]), score)
        for key, score in scores.items()
        if (found := re.fullmatch(r"privacy\.canaries\.copies_(\d+)", key))
    ]
    if not points:
        return None
    figure, axes = new_axes(f"copies in the training text{of}", "exposure of canaries, bits")
    _curve(axes, sorted(points, key=lambda p: p[0]), CURVES[0], "canaries", 1)
    axes.set_ylim(bottom=0)
    legend(axes)
    return as_svg(figure)


def _curve(axes: Any, points: Any, color: str, label: str, scale: float) -> None:
    x = [copies for copies, _ in points]
    y = [scale * s["value"] for _, s in points]
    below = [scale * max(0.0, s["value"] - s["low"]) for _, s in points]
    above = [scale * max(0.0, s["high"] - s["value"]) for _, s in points]
    axes.errorbar(
        x, y, yerr=[below, above], color=color, label=label, linewidth=2, marker="o",
        markersize=3.5, elinewidth=1, capsize=2,
    )  # fmt: skip
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(x, [str(c) for c in x])
    axes.minorticks_off()
