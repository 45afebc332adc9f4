"""Compare Muon with AdamW after the same tokens, each at the best of its learning rates.

Both have the same initial state and data order (the sources of Python's standard library), with
linear warm-up and decay. Seconds are processor time, which other processes disturb least.

    python bench/train/muon.py                    300 steps of 2 x 256 tokens at three rates each
    python bench/train/muon.py --steps 100 --rates 3e-3
"""

import argparse
import statistics
import time
from pathlib import Path

import bench_path  # noqa: F401
import torch
from harness import machine, positive, save
from loss_curve import BATCH, LENGTH, text_tokens
from torch import Tensor

import fastlm
from fastlm.memory import keep_freed_memory
from fastlm.muon import muon_groups
from fastlm.train.objective import decay_matrices

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN = 4096, 128, 4, 4, 352
RATES = {"adamw": (1.5e-3, 3e-3, 6e-3), "muon": (3e-3, 6e-3, 1.2e-2)}
WARMUP, LAST = 0.05, 20  # share of the steps; steps whose mean loss is compared


def train(name: str, rate: float, tokens: Tensor, steps: int) -> dict[str, float]:
    config = fastlm.ModelConfig(
        model_type="qwen3", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=WIDTH // HEADS,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    model = fastlm.CausalLM(config, seed=0)
    groups = decay_matrices(model, 0.1)
    shared = {"betas": (0.9, 0.95), "master_weights": True, "max_grad_norm": 1.0}
    if name == "muon":
        optimizer = fastlm.Muon(muon_groups(groups, model), **shared)
    else:
        optimizer = fastlm.AdamW(groups, **shared)
    optimizer.keep_masters()
    model.bfloat16()
    losses, passes, updates = [], [], []
    for step in range(steps):
        window = tokens[step * BATCH * LENGTH :][: BATCH * LENGTH + 1]
        ids, labels = window[:-1].view(BATCH, LENGTH), window[1:].view(BATCH, LENGTH)
        start = time.process_time()
        loss = model(ids, shift_labels=labels).loss
        loss.backward()
        middle = time.process_time()
        progress = (step + 0.5) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        optimizer.step()
        end = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        passes.append(middle - start)
        updates.append(end - middle)
    return {
        "loss": statistics.mean(losses[-LAST:]),
        "forward and backward s": statistics.median(passes),
        "optimizer s": statistics.median(updates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument(
        "--rates", type=float, nargs="+", help="rates of both, instead of three each"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    options = parser.parse_args()
    tokens = text_tokens(VOCABULARY, options.steps * BATCH * LENGTH + 1)
    keep_freed_memory()
    results: dict[str, dict[str, float]] = {}
    for name, rates in RATES.items():
        for rate in options.rates or rates:
            result = results[f"{name} {rate:g}"] = train(name, rate, tokens, options.steps)
            print(name, f"{rate:g}", {key: round(value, 4) for key, value in result.items()})
    save(options.json, {"muon": results, "threads": torch.get_num_threads(), "machine": machine()})


if __name__ == "__main__":
    main()
