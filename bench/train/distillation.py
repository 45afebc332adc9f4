"""Distill SmolLM2-135M-Instruct into a student of its first and last layers: held-out cross-entropy
after the same tokens, with and without the teacher.

    python bench/train/distillation.py --out FOLDER

Both start as the same student and use the same conversations in the same order: `fastlm sft`, and
`fastlm distill` with the teacher's 64 likeliest tokens on disk. A seed is an order; differences are
paired by seed. Only the conversations of one epoch of the steps are read. An interrupted call
continues in FOLDER. Seconds are processor time.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import bench_path  # noqa: F401
import torch
from harness import machine, positive, save

from fastlm.checkpoint.config import ModelConfig
from fastlm.data.conversations import read_conversations
from fastlm.model.causal_lm import CausalLM
from fastlm.sources.packages import default_cache
from fastlm.tokenizer.load import load_tokenizer
from fastlm.train.distill import Distill
from fastlm.train.sft import SFT, SFTObjective

TEACHER = "model:smollm2"
DATA = "sdist:llamafactory#*alpaca_en_demo.json"
TOP_K, BATCH, HELDOUT = 64, 8, 0.2


def outer_layers(layers: int, folder: Path) -> Path:
    """Write the teacher without its middle layers to ``folder``. None of 13 choices of 8 to 20
    layers was a language model before training (10.3 to 23 nats per token; a uniform guess has
    10.8).
    """
    teacher = CausalLM.from_pretrained(TEACHER, dtype=torch.float32, keep_quantized=False)
    config = teacher.config.to_dict()
    first, all_layers = layers - layers // 2, len(teacher.model.layers)
    indices = [*range(first), *range(all_layers - layers // 2, all_layers)]
    student = CausalLM(ModelConfig.from_dict({**config, "num_hidden_layers": layers}), seed=0)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for layer, index in zip(student.model.layers, indices, strict=True):
        layer.load_state_dict(teacher.model.layers[index].state_dict())
    student.save_pretrained(folder)
    load_tokenizer(TEACHER, config).save(folder)
    return folder


def some_rows(count: int, file: Path) -> str:
    """Write the first conversations of `DATA` to ``file``."""
    rows = islice(read_conversations((DATA,), cache=default_cache()), count)
    file.write_text("".join(json.dumps(row.row()) + "\n" for row in rows))
    return str(file)


def heldout_loss(stage: SFT, model: str | Path) -> float:
    """Return the mean cross-entropy of the held-out answers' tokens."""
    student = CausalLM.from_pretrained(model, dtype=torch.float32, keep_quantized=False)
    ctx = stage.context("unused", model=model)
    data = stage.read_data(load_tokenizer(model, student.config.to_dict()), 2048, ctx)
    objective = SFTObjective(
        student, data.training, data.heldout, replace(stage.train_options(1), val_tokens=10**9),
        batch_size=stage.batch_size, seed=0, base="", tokenizer=None, prompt=(),
    )  # fmt: skip
    with torch.no_grad():
        return objective.validate()["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=80)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sft-weight", type=float, default=0.0, help="weight of the cross-entropy")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    options = parser.parse_args()
    student = options.out / "student"
    if not student.exists():
        outer_layers(options.layers, student)
    rows = some_rows(int(BATCH * options.steps / (1 - HELDOUT)), options.out / "rows.jsonl")
    shared = dict(
        data=(rows,), batch_size=BATCH, max_length=192, heldout=HELDOUT, max_steps=options.steps,
        lr=options.lr, validations=0, sample_at=(), save_steps=10**6,
    )  # fmt: skip
    without = SFT(**shared)
    distill = Distill(**shared, sft_weight=options.sft_weight, teacher_top_k=TOP_K)
    logits = options.out / "with-0" / "teacher-logits"
    results: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for seed in range(options.seeds):
        for name, stage in (("without", without), ("with", distill)):
            arguments = {"model": student}
            if name == "with" and seed:  # the teacher runs once
                stage = replace(stage, teacher_top_k=None, teacher_logits=str(logits))
            elif name == "with":
                arguments["teacher"] = TEACHER
            out = options.out / f"{name}-{seed}"
            start = time.process_time()
            result = replace(stage, seed=seed)(out, **arguments)
            seconds = time.process_time() - start
            loss = heldout_loss(without, out)
            results[name].append({"loss": loss, "tokens": result["tokens"], "seconds": seconds})
            summary = {k: round(v, 3) for k, v in results[name][-1].items()}
            print(f"seed {seed} {name:8}", summary, flush=True)
    losses = {name: [run["loss"] for run in runs] for name, runs in results.items()}
    gaps = [a - b for a, b in zip(losses["with"], losses["without"])]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    before, teacher = heldout_loss(without, student), heldout_loss(without, TEACHER)
    print(f"student before {before:.3f}, teacher {teacher:.3f}")
    for name, values in losses.items():
        print(f"{name:8} {statistics.mean(values):.3f}")
    print(f"with - without: {statistics.mean(gaps):+.3f} ± {error:.3f} (standard error, paired)")
    save(options.json, {
        "distillation": results, "before": before, "teacher": teacher, "gaps": gaps,
        "threads": torch.get_num_threads(), "machine": machine(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
