"""Compare two results of one benchmark, row by row: faster, slower, or within the noise.

    python bench/ops/rope.py --json before.json
    python bench/ops/rope.py --json after.json
    python bench/compare.py before.json after.json [--plot compare.png]

The files are those of --json, or of bench/results/. A time counts as changed if it differs by more
than the sum of both spreads and by more than 2 %.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

MIN_DIFFERENCE = 0.02  # the difference between two runs on one quiet machine
KINDS = ("faster", "slower", "same", "unsteady")


@dataclass
class Change:
    label: str
    before: float  # milliseconds
    after: float
    noise: float
    unsteady: bool

    @property
    def ratio(self) -> float:
        return self.before / self.after

    @property
    def kind(self) -> str:
        if self.unsteady:
            return "unsteady"
        if abs(self.after - self.before) <= max(MIN_DIFFERENCE, self.noise) * self.before:
            return "same"
        return "faster" if self.after < self.before else "slower"


def rows_of(path: Path) -> dict[tuple[str, str, str, str], dict]:
    """Return (op, name, shape, variant) -> milliseconds, spread, and if the row is unsteady."""
    try:
        results = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {path}: {error}")
    ops = {results["op"]: results} if "op" in results else results
    rows = {}
    for op, result in ops.items():
        if not isinstance(result, dict):
            continue
        for row in result.get("rows", []):
            if "milliseconds" in row:
                for variant, ms in row["milliseconds"].items():
                    rows[op, row["name"], row["shape"], variant] = {
                        "ms": ms,
                        "spread": row["spread"][variant],
                        "unsteady": row.get("unsteady", ""),
                    }
            elif "tokens_per_second" in row:  # whole training steps
                key = (op, row.get("configuration", ""), "", row["variant"])
                rows[key] = {
                    "ms": 1e3 / row["tokens_per_second"],
                    "spread": row["spread"],
                    "unsteady": "",
                }
    return rows


def changes(before: dict, after: dict, variants: str) -> list[Change]:
    return [
        Change(
            " ".join(filter(None, key)),
            a["ms"],
            b["ms"],
            a["spread"] + b["spread"],
            bool(a["unsteady"] or b["unsteady"]),
        )
        for key, a in before.items()
        if (b := after.get(key)) and key[-1].startswith(variants)
    ]


def table(changes: list[Change]) -> str:
    lines = ["| row | before | after | speedup | spreads | |", "|---|---|---|---|---|---|"]
    for c in sorted(changes, key=lambda c: c.ratio):
        kind = "" if c.kind == "same" else c.kind
        lines.append(f"| {c.label} | {c.before:.3g} | {c.after:.3g} | {c.ratio:.2f}x "
                     f"| {c.noise:.0%} | {kind} |")  # fmt: skip
    return "\n".join(lines)


def plot(changes: list[Change], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    changes = sorted(changes, key=lambda c: c.ratio)
    colours = {"faster": "#2a78d6", "slower": "#d6452a", "same": "#9aa5b1", "unsteady": "#ffffff"}
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(changes)), layout="constrained")
    bars = axes.barh(
        range(len(changes)),
        [c.ratio - 1 for c in changes],
        left=1,
        xerr=[c.noise for c in changes],
        color=[colours[c.kind] for c in changes],
        ecolor="#5f6b7a",
    )
    for bar, change in zip(bars, changes):
        if change.unsteady:  # neither faster nor slower
            bar.set(hatch="///", edgecolor="#5f6b7a", linewidth=0.5)
    labels = [f"{c.label} (unsteady)" if c.unsteady else c.label for c in changes]
    axes.set_yticks(range(len(changes)), labels, fontsize=7)
    axes.set_ylim(-0.6, len(changes) - 0.4)
    axes.axvline(1, color="#1f2933", linewidth=0.8)
    axes.set_xlabel("speedup (before / after); whiskers: the sum of both spreads")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="Compare the peers' rows too.")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="Draw the ratios to a file.")
    options = parser.parse_args()
    before, after = rows_of(options.before), rows_of(options.after)
    differences = changes(before, after, "" if options.all else "fastlm")
    if not differences:
        sys.exit(f"compare: {options.before} and {options.after} have no row in common")
    print(table(differences))
    counts = {kind: sum(c.kind == kind for c in differences) for kind in KINDS}
    print(", ".join(f"{n} {kind}" for kind, n in counts.items()))
    if options.plot:
        plot(differences, options.plot)
        print(f"written: {options.plot}")


if __name__ == "__main__":
    main()
