"""Render the results of serve.py as tables and a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS = "fastlm"
COLORS = ("#2f6fde", "#b3452f", "#6b7785")  # fastlm, then the others


def tables(results: Mapping[str, Any]) -> str:
    """Return a Markdown table for each measured part."""
    parts = {"serve": load_table, "poisson": poisson_table, "cold": cold_table}
    return "\n\n".join(table(results[name]) for name, table in parts.items() if name in results)


def seconds(value: float) -> str:
    if value != value:  # NaN: there are no values
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def pair(figures: Mapping[str, float], name: str) -> str:
    return f"{seconds(figures[f'{name}_p50'])}, {seconds(figures[f'{name}_p99'])}"


def load_table(rows: Mapping[str, Any]) -> str:
    """Return a line for each number of clients and server, with fastlm's relative throughput."""
    lines = [
        "| clients | server | answers/s | tokens/s | fastlm is | first token p50, p99"
        " | between tokens p50, p99 | whole answer p50, p99 |",
        "|" + "---|" * 8,
    ]
    for number in rows[OURS]:
        for name, by_clients in rows.items():
            f = by_clients[number]
            ratio = rows[OURS][number]["tokens_per_second"] / f["tokens_per_second"]
            cells = (number, name, f"{f['requests_per_second']:.2f}")
            cells += (f"{f['tokens_per_second']:.0f}", f"{ratio:.2f}x")
            cells += tuple(pair(f, key) for key in ("first_token", "between_tokens", "latency"))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def poisson_table(rows: Mapping[str, Any]) -> str:
    """Return a line for each server: at a share of its capacity, and with one client."""
    lines = [
        "| server | capacity | requests arrive | between tokens p50, p99 | alone | p99 to p99 alone"
        " | first token p50, p99 | alone |",
        "|" + "---|" * 8,
    ]
    for name, row in rows.items():
        unloaded, loaded = row["unloaded"], row["loaded"]
        cells = (name, f"{row['capacity']['requests_per_second']:.2f}/s", f"{row['rate']:.2f}/s")
        cells += (pair(loaded, "between_tokens"), pair(unloaded, "between_tokens"))
        cells += (f"{row['p99_to_unloaded']:.1f}x",)
        cells += (pair(loaded, "first_token"), pair(unloaded, "first_token"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cold_table(rows: Mapping[str, Any]) -> str:
    """Return a line for each program: seconds from its start to the first text."""
    lines = ["| first text of | program | median | all | fastlm takes |", "|" + "---|" * 5]
    for kind, by_name in rows.items():
        for name, row in by_name.items():
            ratio = by_name[OURS]["seconds"] / row["seconds"]
            times = ", ".join(f"{t:.2f}" for t in row["all"])
            cells = (kind, name, f"{row['seconds']:.2f} s", times, f"{ratio:.2f}x")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Mapping[str, Any], path: Path) -> None:
    """Plot throughput and the 99th percentile between tokens against the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    series = (
        (panels[0], "tokens_per_second", 1, "tokens per second, all clients"),
        (panels[1], "between_tokens_p99", 1e3, "between tokens, 99th percentile, ms"),
    )
    for axes, key, scale, title in series:
        for (name, by_clients), color in zip(rows.items(), COLORS):
            numbers = sorted(map(int, by_clients))
            values = [by_clients[str(n)][key] * scale for n in numbers]
            axes.plot(numbers, values, color=color, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(n) for n in numbers])
        if scale == 1:
            axes.set_ylim(bottom=0)
        else:  # from milliseconds to seconds
            axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_xlabel("clients", fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(axis="y", color="#e3e7ec", linewidth=0.7)
        axes.set_axisbelow(True)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
