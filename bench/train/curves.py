"""Draw the curves of trainings: a panel per metric, a thin line per seed and a thick one for their
mean. The title of a panel of one group names the range of its seeds at the end.

    python bench/train/curves.py 'sums=runs/reason/sums/runs/*:val_score' -o docs/reason.png \
        --ylabel 'share solved, held out' --from-zero

A panel is TITLE=FOLDERS:METRIC. FOLDERS is a glob pattern of folders with a metrics.jsonl. Folders
whose names differ in the seed only, such as those of a sweep, have the same color. With
``--from-zero`` all panels have one y axis, which begins at 0.
"""

import argparse
import glob
import re
import statistics
from collections import defaultdict
from pathlib import Path

import bench_path  # noqa: F401

from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.sweep import RUNS

WIDTH, HEIGHT = 3.6, 2.8  # of a panel, in inches


def read_curve(folder: Path, metric: str) -> dict[int, float]:
    """Return step -> value."""
    rows = read_metrics(folder / METRICS)
    return {row["step"]: row[metric] for row in rows if metric in row}


def group_of(folder: Path) -> tuple[Path, str]:
    """Return what runs that differ in the seed only have in common: their parent, and a label: the
    values of a sweep's grid, or the name of the sweep.
    """
    values = re.sub(r",?seed=\d+$", "", folder.name)
    sweep = folder.parents[1] if folder.parent.name == RUNS else folder.parent
    return folder.parent, values or sweep.name


def main() -> None:
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("panels", nargs="+", metavar="TITLE=FOLDERS:METRIC")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--ylabel", help="the name of the metric on the y axis")
    parser.add_argument("--from-zero", action="store_true")
    a = parser.parse_args()
    figure = Figure(figsize=(WIDTH * len(a.panels), HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(a.panels), squeeze=False, sharey=a.from_zero)[0]
    for axis, panel in zip(axes, a.panels):
        title, _, rest = panel.partition("=")
        pattern, _, metric = rest.rpartition(":")
        groups = defaultdict(list)
        for folder in map(Path, sorted(glob.glob(pattern))):
            groups[group_of(folder)].append(read_curve(folder, metric))
        if not groups or not all(all(curves) for curves in groups.values()):
            parser.error(f"panels: expected folders with {metric}, got {pattern}")
        for number, ((_, label), curves) in enumerate(groups.items()):
            color = f"C{number}"
            for curve in curves:
                axis.plot([*curve], [*curve.values()], color=color, alpha=0.3, linewidth=1)
            steps = sorted(set.intersection(*map(set, curves)))
            means = [statistics.mean(curve[step] for curve in curves) for step in steps]
            axis.plot(steps, means, color=color, linewidth=2, label=label)
        counts = sorted({len(curves) for curves in groups.values()})
        seeds = "1 seed" if counts == [1] else f"{' or '.join(map(str, counts))} seeds"
        ends = [[*curve.values()][-1] for curves in groups.values() for curve in curves]
        spread = f": {min(ends):.2f} to {max(ends):.2f}" if len(groups) == 1 < len(ends) else ""
        axis.set_title(f"{title}, {seeds}{spread}", fontsize=10)
        if len(groups) > 1:
            axis.legend(fontsize=7)
        axis.set_xlabel("step")
        axis.set_ylabel(a.ylabel or metric)
        axis.grid(alpha=0.3)
    if a.from_zero:
        axes[0].set_ylim(bottom=0)  # of all panels
    figure.savefig(a.out, dpi=150)


if __name__ == "__main__":
    main()
