"""report.html: one page about one run, whole in itself: no scripts, no network, light, printable.

Charts are matplotlib's SVG inside the page: they stay sharp and their numbers can be searched. A
page of JavaScript charts was the alternative; it would have to carry its library or fetch it.
Every text of the run (samples are written by a model, names of sources come from a recipe) goes
through jinja2's escaping.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from fastlm.data.prepare import Funnel
from fastlm.files import save_atomic

if TYPE_CHECKING:
    from fastlm.recipe import Recipe

INK, SOFT, LINE = "#1c2733", "#5d6b7a", "#dfe4ea"
BLUE, PALE, ORANGE, GREEN = "#2f6fde", "#b9cdf3", "#d9822b", "#2e8b6a"
# Inches of a chart: as wide as a phone shows it, so that its text keeps its size there; on a screen
# it takes half of the page
SIZE = (4.9, 3.2)
FONT = 9.5  # points
LABEL_HEIGHT = 13.0  # points: a line of FONT and air
SMOOTHING = 0.05  # of the run: the width of the running mean over the noisy training loss


def write_report(
    path: Path,
    summary: dict[str, Any],
    funnel: Funnel,
    metrics: list[dict[str, Any]],
    recipe: "Recipe",
) -> None:
    """Writes the page at ``path``. ``summary`` as in summary.json, ``metrics`` the lines of
    metrics.jsonl.
    """
    html = render_report(summary, funnel, metrics, recipe)
    save_atomic(path, lambda p: p.write_text(html, "utf-8"))


def render_report(
    summary: dict[str, Any], funnel: Funnel, metrics: list[dict[str, Any]], recipe: "Recipe"
) -> str:
    template = (Path(__file__).parent / "report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size_text, "seconds": seconds_text, "count": count_text}
    return environment.from_string(template).render(
        s=summary,
        recipe=recipe,
        funnel=funnel_rows(funnel),
        sources=sorted(funnel.sources.items(), key=lambda kv: -kv[1]["bytes"]),
        samples=[m for m in metrics if "sample" in m],
        curve=markup(loss_chart(metrics)),
        bits=markup(bits_chart(metrics, summary)),
        yardsticks=yardsticks(summary),
        stages=stage_rows(summary["stage_seconds"]),
    )


def markup(svg: str) -> Any:
    """Our own SVG, the only text that is not escaped."""
    from markupsafe import Markup

    return Markup(svg)


# what the page shows


def funnel_rows(funnel: Funnel) -> list[dict[str, Any]]:
    """A row a step: what is left, as a share of what was gathered, and the largest reasons
    for what went.
    """
    most = max((s["bytes"] for s in funnel.steps), default=1) or 1
    rows = []
    for step in funnel.steps:
        reasons = sorted(step["removed"].items(), key=lambda kv: -kv[1])
        replaced = [f"{n:,} {what} replaced" for what, n in step.get("replaced", {}).items() if n]
        why = [f"{count:,} {reason}" for reason, count in reasons[:5]]
        if len(reasons) > 5:
            why.append(f"{sum(n for _, n in reasons[5:]):,} for other reasons")
        rows.append({
            "step": step["step"], "documents": step["documents"], "bytes": step["bytes"],
            "percent": 100 * step["bytes"] / most, "why": why + replaced,
        })  # fmt: skip
    return rows


def yardsticks(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte of the compressors and the model, as bars of the difference to xz: to the
    left of its line what needs less, to the right what needs more. Bars from zero would be
    nearly equal.
    """
    xz = summary["bits_per_byte_xz"]
    rows = [
        ("zstd -19", summary["bits_per_byte_zstd"], SOFT),
        ("xz -9e", xz, SOFT),
        (f"model, {summary['format']}", summary["bits_per_byte_int4"], GREEN),
        ("model, bf16", summary["bits_per_byte"], BLUE),
    ]
    least, most = min(value for _, value, _ in rows), max(value for _, value, _ in rows)
    span = max(most - least, 0.1 * xz)  # differences of nothing stay short
    return [
        {
            "name": name, "value": value, "color": color, "change": 100 * (value / xz - 1),
            "left": 100 * (min(value, xz) - least) / span, "width": 100 * abs(value - xz) / span,
            "line": 100 * (xz - least) / span,
        }
        for name, value, color in rows
    ]  # fmt: skip


def stage_rows(seconds: dict[str, float]) -> list[dict[str, Any]]:
    total = sum(seconds.values()) or 1.0
    shades = ("#2f6fde", "#5b8ee6", "#86adee", "#2e8b6a", "#d9822b", "#e6a766", "#8a97a6")
    return [
        {"name": name, "seconds": value, "percent": 100 * value / total, "color": shade}
        for (name, value), shade in zip(seconds.items(), shades)
    ]


# charts


def loss_chart(metrics: list[dict[str, Any]]) -> str:
    """Training loss (each step pale, running mean strong) and held-out loss, in nats per
    token, over tokens seen.
    """
    steps = [m for m in metrics if "loss" in m]
    tokens = {m["step"]: m["tokens"] / 1e6 for m in steps} | {0: 0.0}
    figure, axes = _axes("million tokens seen", "loss, nats per token")
    x, y = [tokens[m["step"]] for m in steps], [m["loss"] for m in steps]
    axes.plot(x, y, color=PALE, linewidth=0.8, label="training, each step")
    axes.plot(x, _running_mean(y), color=BLUE, linewidth=2, label="running mean")
    held = [(tokens[m["step"]], m["val_loss"]) for m in metrics if "val_loss" in m]
    if held:
        axes.plot(
            *zip(*held), color=ORANGE, linewidth=1.5, marker="o", markersize=3.5, label="held-out"
        )
    rates = axes.twinx()
    rates.plot(x, [m["lr"] for m in steps], color=LINE, linewidth=1.5, zorder=0)
    rates.set_ylim(bottom=0)
    rates.tick_params(colors=SOFT, labelsize=FONT, length=0)
    rates.ticklabel_format(axis="y", style="plain")
    rates.set_ylabel("learning rate (grey)", color=SOFT, fontsize=FONT)
    rates.spines[:].set_visible(False)
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.legend(
        frameon=False, fontsize=FONT, labelcolor=INK, loc="lower left", bbox_to_anchor=(-0.02, 1),
        ncols=3, columnspacing=1.2, handlelength=1.4, borderpad=0,
    )  # fmt: skip
    return _svg(figure)


def bits_chart(metrics: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Held-out bits per byte while training, against the compressors' lines."""
    return _svg(_bits_figure(metrics, summary))


def _bits_figure(metrics: list[dict[str, Any]], summary: dict[str, Any]) -> Any:
    # tokens, not minutes: the same curve on every machine, and a pause is no plateau
    tokens = {m["step"]: m["tokens"] / 1e6 for m in metrics if "loss" in m} | {0: 0.0}
    held = [(tokens[m["step"]], m["bits_per_byte"]) for m in metrics if "bits_per_byte" in m]
    figure, axes = _axes("million tokens seen", "held-out bits per byte")
    if held:
        axes.plot(*zip(*held), color=ORANGE, linewidth=2, marker="o", markersize=3.5)
        axes.plot([held[-1][0]], [summary["bits_per_byte"]], "o", color=BLUE, markersize=5)
    labels = [("model", summary["bits_per_byte"], BLUE)]
    for key, name in (("xz", "xz -9e"), ("zstd", "zstd -19")):
        value = summary[f"bits_per_byte_{key}"]
        axes.axhline(value, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        labels.append((name, value, SOFT))
    top = max(summary["bits_per_byte_zstd"], summary["bits_per_byte"])
    values = [summary["bits_per_byte"], summary["bits_per_byte_xz"]]
    # an untrained model starts near 3 bits per byte or higher: the axis shows where it
    # crosses the lines, and the start as long as that is not far above them
    first = min(held[0][1], 2 * top) if held else top
    axes.set_ylim(min(values) - 0.15 * top, max(1.6 * top, 1.04 * first))
    _label_values(axes, labels)
    return figure


def _label_values(axes: Any, labels: list[tuple[str, float, str]]) -> None:
    """Writes (name, value, color) right of the axes, where no curve is, each at its value's height
    or, where two would touch, as near to it as their order allows, with a line to it.
    """
    axes.figure.draw_without_rendering()  # the layout decides how high the axes are
    to_points = 72 / axes.figure.dpi
    labels = sorted(labels, key=lambda label: label[1])
    wanted = [axes.transData.transform((0, value))[1] * to_points for _, value, _ in labels]
    for (name, value, color), y, at in zip(labels, _apart(wanted, LABEL_HEIGHT), wanted):
        axes.annotate(
            f"{name} {value:.3f}", (1, value), (9, y - at), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", va="center", color=color, fontsize=FONT,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1,
                        "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


def _apart(wanted: list[float], gap: float) -> list[float]:
    """The ascending ``wanted``, moved so that neighbours are at least ``gap`` apart: a group that
    would overlap is spread around its middle.
    """
    groups: list[list[float]] = []
    for y in wanted:
        groups.append([y])
        while len(groups) > 1 and _span(groups[-2], gap)[1] + gap > _span(groups[-1], gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_span(group, gap)[0] + i * gap for group in groups for i in range(len(group))]


def _span(group: list[float], gap: float) -> tuple[float, float]:
    """Lowest and highest place of a group that stands around its middle."""
    middle, half = sum(group) / len(group), gap * (len(group) - 1) / 2
    return middle - half, middle + half


def _axes(x_label: str, y_label: str) -> Any:
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


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Any: rc_context wants its keys as literals
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "fastlm", "font.family": "sans-serif",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" class="chart" ', 1)


def _running_mean(values: list[float]) -> list[float]:
    width = max(1, int(SMOOTHING * len(values)))
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        result.append(total / min(i + 1, width))
    return result


# numbers as people read them


def size_text(value: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def seconds_text(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def count_text(value: float) -> str:
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.2f} M" if value >= 1e6 else f"{value / 1e3:,.0f} k"
