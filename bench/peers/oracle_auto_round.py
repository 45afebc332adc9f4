"""Quantize the base of `bench/peers/quantization.py --leave FOLDER` by auto-round (PyPI, Intel).

The result is for its `--oracle`. It needs a separate environment: torch, transformers and
auto-round, no fastlm.

    python bench/peers/oracle_auto_round.py FOLDER OUT [--group-size 32] [--iterations 200]

It quantizes the linear layers of the decoder to int4, symmetric, on the same calibration windows,
and writes the model with dequantized layers and oracle.json. The embedding is unchanged: auto-round
does not quantize a tied head.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args()
    windows = load_file(options.base / "calibration.safetensors")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    began = time.process_time()
    rounding = AutoRound(
        model, tokenizer, scheme="W4A16", group_size=options.group_size, sym=True,
        iters=options.iterations, nsamples=len(windows), seqlen=windows.shape[1], batch_size=8,
        dataset=list(windows.split(8)), enable_torch_compile=False, device_map="cpu", amp=False,
    )  # fmt: skip
    tuned, _ = rounding.quantize()
    seconds = time.process_time() - began
    tuned.save_pretrained(options.out)
    summary = {
        "grid": f"g{options.group_size}",
        "seconds": seconds,
        "iterations": options.iterations,
    }
    (options.out / "oracle.json").write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
