"""Draw the curves of trainings: a panel per metric, a thin line per seed and a thick one for their
mean.

    python bench/train/curves.py 'sums=runs/reason/sums/runs/*:val_score' -o docs/reason.png

A panel is TITLE=FOLDERS:METRIC. FOLDERS is a glob pattern of folders with a metrics.jsonl.
"""

import argparse
import glob
import statistics
from pathlib import Path

import bench_path  # noqa: F401

from fastlm.train.metrics import METRICS, read_metrics

WIDTH, HEIGHT = 3.6, 2.8  # of a panel, in inches


def read_curve(folder: str, metric: str) -> dict[int, float]:
    """Return step -> value."""
    rows = read_metrics(Path(folder) / METRICS)
    return {row["step"]: row[metric] for row in rows if metric in row}


def main() -> None:
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("panels", nargs="+", metavar="TITLE=FOLDERS:METRIC")
    parser.add_argument("-o", "--out", type=Path, required=True)
    a = parser.parse_args()
    figure = Figure(figsize=(WIDTH * len(a.panels), HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(a.panels), squeeze=False)[0]
    for axis, panel in zip(axes, a.panels):
        title, _, rest = panel.partition("=")
        pattern, _, metric = rest.rpartition(":")
        curves = [read_curve(folder, metric) for folder in sorted(glob.glob(pattern))]
        if not curves or not all(curves):
            parser.error(f"panels: expected folders with {metric}, got {pattern}")
        for curve in curves:
            axis.plot([*curve], [*curve.values()], color="tab:blue", alpha=0.35, linewidth=1)
        steps = sorted(set.intersection(*map(set, curves)))
        means = [statistics.mean(curve[step] for curve in curves) for step in steps]
        axis.plot(steps, means, color="tab:blue", linewidth=2)
        axis.set_title(f"{title}, {len(curves)} seeds", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
    figure.savefig(a.out, dpi=150)


if __name__ == "__main__":
    main()
