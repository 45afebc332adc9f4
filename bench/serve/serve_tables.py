"""The tables and the plot of serve.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS = "fastlm"
COLORS = ("#2f6fde", "#b3452f", "#6b7785")  # fastlm, then the others


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: a table for each part that was measured."""
    parts = {"serve": of_load, "poisson": of_poisson, "cold": of_cold}
    return "\n\n".join(table(found[name]) for name, table in parts.items() if name in found)


def seconds(value: float) -> str:
    if value != value:  # nothing to take a percentile of
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def pair(figures: Mapping[str, float], name: str) -> str:
    return f"{seconds(figures[f'{name}_p50'])}, {seconds(figures[f'{name}_p99'])}"


def of_load(rows: Mapping[str, Any]) -> str:
    """One line per number of clients and server; throughput of fastlm relative to it."""
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


def of_poisson(rows: Mapping[str, Any]) -> str:
    """One line per server: at a share of its capacity, beside one client alone."""
    lines = [
        "| server | capacity | requests arrive | between tokens p50, p99 | alone | p99 to p99 alone"
        " | first token p50, p99 | alone |",
        "|" + "---|" * 8,
    ]
    for name, row in rows.items():
        alone, loaded = row["unloaded"], row["loaded"]
        cells = (name, f"{row['capacity']['requests_per_second']:.2f}/s", f"{row['rate']:.2f}/s")
        cells += (pair(loaded, "between_tokens"), pair(alone, "between_tokens"))
        cells += (f"{row['p99_to_unloaded']:.1f}x",)
        cells += (pair(loaded, "first_token"), pair(alone, "first_token"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_cold(rows: Mapping[str, Any]) -> str:
    """One line per program: seconds from its start to the first text."""
    lines = ["| first text of | program | median | all | fastlm takes |", "|" + "---|" * 5]
    for kind, by_name in rows.items():
        for name, row in by_name.items():
            ratio = by_name[OURS]["seconds"] / row["seconds"]
            every = ", ".join(f"{t:.2f}" for t in row["all"])
            cells = (kind, name, f"{row['seconds']:.2f} s", every, f"{ratio:.2f}x")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Mapping[str, Any], path: Path) -> None:
    """Throughput, and the 99th percentile between tokens, against the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = (
        (panels[0], "tokens_per_second", 1, "tokens per second, all clients"),
        (panels[1], "between_tokens_p99", 1e3, "between tokens, 99th percentile, ms"),
    )
    for axes, key, scale, title in shown:
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
