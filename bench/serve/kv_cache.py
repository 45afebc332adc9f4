"""Measure the time and the loss of fewer bits for keys and values in decode steps on the CPU.

    python bench/serve/kv_cache.py              time of int8 against float16
    python bench/serve/kv_cache.py --text FILE  KL, bits per byte, greedy agreement, against float32

The time is that of a step with --rows rows, each after --keys cached tokens; the dtypes take turns.
For the loss, windows of text run through the steps, 64 rows at a time, so that every token attends
to keys of that dtype.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import bench_path  # noqa: F401
import torch
from harness import positive

from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager
from fastlm.inference.decode_batch import MAX_ROWS
from fastlm.model import cpu_decode
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
TIMED_DTYPES = (torch.float16, torch.int8)


class CachedSteps:
    """Decode steps with a KV cache of their own."""

    def __init__(self, model: CausalLM, rows: int, blocks_per_row: int, dtype: torch.dtype):
        self.block_manager = BlockManager(model.config, rows * blocks_per_row, dtype=dtype)
        plan = cpu_decode.decode_plan(model)
        assert plan is not None
        self.steps = cpu_decode.CpuDecodeRunner(
            model, plan, self.block_manager.data, self.block_manager.scales
        )

    def fill(self) -> None:
        for layer in self.block_manager.data:
            layer.random_(-2, 3)
        if self.block_manager.scales is not None:
            self.block_manager.scales.fill_(0.02)


def measure_times(model: CausalLM, rows: int, keys: int, turns: int) -> None:
    blocks_per_row = -(-(keys + 1) // BLOCK_SIZE)
    table = torch.arange(rows * blocks_per_row, dtype=torch.int32).view(rows, blocks_per_row)
    step = torch.arange(rows), torch.full((rows,), keys), table
    sides = {dtype: CachedSteps(model, rows, blocks_per_row, dtype) for dtype in TIMED_DTYPES}
    seconds = {dtype: [] for dtype in TIMED_DTYPES}
    for side in sides.values():
        side.fill()
        side.steps.logits(*step)
    for _ in range(turns):
        for dtype, side in sides.items():
            start = time.perf_counter()
            side.steps.logits(*step)
            seconds[dtype].append(time.perf_counter() - start)
    summary = ", ".join(
        f"{str(dtype)[6:]} {1e3 * statistics.median(times):.2f} ms (best {1e3 * min(times):.2f})"
        for dtype, times in seconds.items()
    )
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(
        f"{rows:3} rows after {keys} tokens: {summary}; int8 is {ratio:.3f} times as fast",
        flush=True,
    )


def measure_losses(
    model: CausalLM, tokenizer: Tokenizer, text: str, windows: int, length: int
) -> None:
    ids = torch.tensor(tokenizer.encode(text)[: windows * length]).view(windows, length)
    count = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in ids)
    reference = None
    for dtype in DTYPES:
        side = CachedSteps(model, 1, -(-length // BLOCK_SIZE), dtype)
        table = torch.arange(side.block_manager.num_blocks, dtype=torch.int32)[None]
        logits = []
        for row in ids:
            for positions in torch.arange(length).split(MAX_ROWS):
                blocks = table.expand(len(positions), -1).contiguous()
                logits.append(side.steps.logits(row[positions], positions, blocks))
        logp = torch.log_softmax(torch.cat(logits).double(), -1).view(windows, length, -1)
        reference = logp if reference is None else reference
        nats = -logp[:, :-1].gather(-1, ids[:, 1:, None]).sum().item()
        kl = (reference.exp() * (reference - logp)).sum(-1).mean().item()
        agreement = (reference.argmax(-1) == logp.argmax(-1)).double().mean().item()
        print(
            f"{str(dtype)[6:]:8}: {side.block_manager.block_bytes // BLOCK_SIZE:6} bytes a token,"
            f" {nats / math.log(2) / count:.4f} bits per byte, KL {kl:.2e} nats,"
            f" top-1 agreement {100 * agreement:.2f} %",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="model:smollm2")
    parser.add_argument("--act-bits", type=positive, help="as in `fastlm serve`")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 16, 64])
    parser.add_argument("--keys", type=positive, default=540)
    parser.add_argument("--turns", type=positive, default=20)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument(
        "--windows", type=positive, default=4, help="windows of text, 512 tokens each"
    )
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = CausalLM.from_pretrained(a.model, act_bits=a.act_bits)
    model.model.fuse()
    with torch.inference_mode():
        if a.text:
            text = a.text.read_text("utf-8")
            measure_losses(model, Tokenizer.load(a.model), text, a.windows, 512)
            return
        for rows in a.rows:
            measure_times(model, rows, a.keys, a.turns)


if __name__ == "__main__":
    main()
