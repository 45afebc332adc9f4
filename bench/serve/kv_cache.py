"""What fewer bits for keys and values save and cost in decode steps on the CPU.

    python bench/serve/kv_cache.py              time of int8 against float16
    python bench/serve/kv_cache.py --text FILE  KL, bits per byte, greedy agreement, against float32

Time is that of a step with so many rows, each after so many cached tokens; both take turns.
Losses: windows of text go through the steps, 64 rows at a time, so that every token attends to keys
of that dtype.
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
TIMED = (torch.float16, torch.int8)


class Steps:
    def __init__(self, model: CausalLM, rows: int, pages: int, dtype: torch.dtype):
        self.pages = BlockManager(model.config, rows * pages, dtype=dtype)
        plan = cpu_decode.decode_plan(model)
        assert plan is not None
        self.steps = cpu_decode.CpuDecodeRunner(model, plan, self.pages.data, self.pages.scales)

    def fill(self) -> None:
        for layer in self.pages.data:
            layer.random_(-2, 3)
        if self.pages.scales is not None:
            self.pages.scales.fill_(0.02)


def times(model: CausalLM, rows: int, keys: int, turns: int) -> None:
    each = -(-(keys + 1) // BLOCK_SIZE)
    table = torch.arange(rows * each, dtype=torch.int32).view(rows, each)
    step = torch.arange(rows), torch.full((rows,), keys), table
    sides = {dtype: Steps(model, rows, each, dtype) for dtype in TIMED}
    seconds = {dtype: [] for dtype in TIMED}
    for side in sides.values():
        side.fill()
        side.steps.logits(*step)
    for _ in range(turns):
        for dtype, side in sides.items():
            began = time.perf_counter()
            side.steps.logits(*step)
            seconds[dtype].append(time.perf_counter() - began)
    told = ", ".join(
        f"{str(dtype)[6:]} {1e3 * statistics.median(own):.2f} ms (best {1e3 * min(own):.2f})"
        for dtype, own in seconds.items()
    )
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(
        f"{rows:3} rows after {keys} tokens: {told}; int8 is {ratio:.3f} times as fast", flush=True
    )


def losses(model: CausalLM, tokenizer: Tokenizer, text: str, windows: int, length: int) -> None:
    ids = torch.tensor(tokenizer.encode(text)[: windows * length]).view(windows, length)
    count = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in ids)
    truth = None
    for dtype in DTYPES:
        side = Steps(model, 1, -(-length // BLOCK_SIZE), dtype)
        table = torch.arange(side.pages.num_blocks, dtype=torch.int32)[None]
        logits = []
        for row in ids:
            for at in torch.arange(length).split(MAX_ROWS):
                part = table.expand(len(at), -1).contiguous()
                logits.append(side.steps.logits(row[at], at, part))
        logp = torch.log_softmax(torch.cat(logits).double(), -1).view(windows, length, -1)
        truth = logp if truth is None else truth
        nats = -logp[:, :-1].gather(-1, ids[:, 1:, None]).sum().item()
        kl = (truth.exp() * (truth - logp)).sum(-1).mean().item()
        same = (truth.argmax(-1) == logp.argmax(-1)).double().mean().item()
        print(
            f"{str(dtype)[6:]:8}: {side.pages.block_bytes // BLOCK_SIZE:6} bytes a token,"
            f" {nats / math.log(2) / count:.4f} bits per byte, KL {kl:.2e} nats,"
            f" likeliest token the same {100 * same:.2f} %",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="model:smollm2")
    parser.add_argument("--act-bits", type=positive, help="as for `fastlm serve`")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 16, 64])
    parser.add_argument("--keys", type=positive, default=540)
    parser.add_argument("--turns", type=positive, default=20)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--windows", type=positive, default=4, help="of text, 512 tokens each")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = CausalLM.from_pretrained(a.model, act_bits=a.act_bits)
    model.model.fuse()
    with torch.inference_mode():
        if a.text:
            text = a.text.read_text("utf-8")
            losses(model, Tokenizer.load(a.model), text, a.windows, 512)
            return
        for rows in a.rows:
            times(model, rows, a.keys, a.turns)


if __name__ == "__main__":
    main()
