"""Measure what the options of DAPO change, and GSPO. The task is that of tool_use.py: products of
two numbers, the calculator, and a model of 0.2 million weights. Here it rarely calls at first, so
that most groups have no right answer.

    python bench/train/dapo.py -o runs/dapo

A round has 8 optimizer steps; with one, ratios would be 1 and nothing clipped. Every variant trains
from the same model with the same seeds. "twice the prompts" samples about as much as
`dynamic_sampling` does. An interrupted command resumes.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
from harness import machine, save
from tool_use import SIZES, measure, train_sft_model, write_questions

from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.online_stage import GRPO

CALLS = 0.05  # the share of conversations with a call
SFT_OPTIONS = {**SIZES["small"]["sft"], "max_steps": 1500}
PROMPTS, GROUP = 16, 8  # of a round
ITERATIONS, STEP_SIZE = 4, 64  # a round's completions are used 4 times, in steps of 64
OPTIONS: dict[str, Any] = {
    **SIZES["small"]["grpo"], "prompts_per_round": PROMPTS, "num_generations": GROUP,
    "num_iterations": ITERATIONS, "batch_size": STEP_SIZE, "gradient_accumulation_steps": 1,
}  # fmt: skip
STEPS = PROMPTS * GROUP * ITERATIONS // STEP_SIZE  # of a round
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "clip_range_high": {"clip_range_high": 0.28},
    "dynamic_sampling": {"dynamic_sampling": 4},
    "clip_range_high+dynamic_sampling": {"clip_range_high": 0.28, "dynamic_sampling": 4},
    "twice-the-prompts": {"prompts_per_round": 2 * PROMPTS, "gradient_accumulation_steps": 2},
    "gspo": {"loss_type": "gspo", "clip_range": 3e-4, "clip_range_high": 4e-4},
}
COLUMNS = ("right", "score", "entropy", "informative_groups", "clip_fraction", "completions")


def summary(rows: list[dict[str, float]]) -> str:
    """Return the mean and the standard error between seeds of each column."""
    cells = []
    for column in COLUMNS:
        values = [row[column] for row in rows]
        digits = 0 if column == "completions" else 3
        cells.append(f"{statistics.mean(values):.{digits}f}")
        if len(values) > 1 and digits:
            cells[-1] += f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"
    return " | ".join(cells)


def train(
    out: Path, seed: int, rounds: int, options: dict[str, Any], questions: int, data: str
) -> dict[str, float]:
    """Train `out`/seed=`seed`. Return the share of right greedy answers, and means of metrics: the
    score and the informative groups of the first half, the entropy of the last fifth.
    """
    options = {**OPTIONS, **options, "max_steps": rounds * STEPS}
    grpo = GRPO(
        data=(data,), environment="calculator", max_turns=3, reward_function="number", seed=seed,
        heldout=0.02, val_prompts=32, validations=5, sample_at=(), save_steps=STEPS, **options,
    )  # fmt: skip
    folder = out / f"seed={seed}"
    grpo(folder, model=out.parent / "sft/model")
    steps = [row for row in read_metrics(folder / METRICS) if "score" in row]
    each = steps[::STEPS]
    drawn = [row.get("prompts_drawn", options["prompts_per_round"]) for row in each]
    half, last = each[: math.ceil(rounds / 2)], each[-math.ceil(rounds / 5) :]
    return {
        "right": measure(folder / "model", questions, 0.0, options)["right"],
        "score": statistics.mean(row["score"] for row in half),
        "entropy": statistics.mean(row["entropy"] for row in last),
        "informative_groups": statistics.mean(row["informative_groups"] for row in half),
        "clip_fraction": statistics.mean(row["clip_fraction"] for row in steps),
        "completions": GROUP * sum(drawn), "seconds": steps[-1]["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/dapo"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    train_sft_model(a.out, CALLS, SFT_OPTIONS)
    data = write_questions(a.out)
    before = {t: measure(a.out / "sft/model", a.questions, t, OPTIONS) for t in (0.0, 1.0)}
    results: list[dict[str, Any]] = [
        {"variant": "before", "temperature": t, **measured} for t, measured in before.items()
    ]
    lines = [f"| variant | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in a.variants:
        rows = [
            train(a.out / name, seed, a.rounds, VARIANTS[name], a.questions, data)
            for seed in a.seeds
        ]
        results += [{"variant": name, "seed": s, **row} for s, row in zip(a.seeds, rows)]
        save(a.json, {"machine": machine(), "results": results})
        lines.append(f"| {name} | {summary(rows)} |")
        print(lines[-1], flush=True)
    print(f"before: {before}", *lines, sep="\n")


if __name__ == "__main__":
    main()
