"""Where a training step's time goes.

torch.profiler over steps of `fastlm_step` (bench/train_step.py), its operators grouped into parts,
each beside what the machine could do: matrix products against the bf16 ceiling of bench/harness.py.

    python -P bench/profile_step.py                  42 M, 8 x 512
    python -P bench/profile_step.py --size 124m --batch 4
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import ceilings, machine
from train_step import SIZES, fastlm_step

WARM, STEPS = 3, 3
# part -> what the names of its operators contain; the first that fits
PARTS = {
    "linear_cross_entropy": ("linear_cross_entropy",),
    "rms_norm": ("rms_norm",),
    "rope": ("rope",),
    "glu": ("glu",),
    "AdamW, clipping": ("AdamW.step",),
    "embedding": ("embedding", "index_select"),
    "sums of gradients": ("aten::add", "aten::sum"),
    "copies and fills": ("copy_", "fill_", "zero_", "aten::clone", "aten::to", "aten::mul"),
}


def part_of(name: str, shapes: list, tokens: int) -> str:
    if name in ("linear", "linearBackward"):  # fastlm's own products
        return "linears: " + ("forward" if name == "linear" else "both gradients")
    if name in ("aten::mm", "aten::addmm"):
        inner = shapes[-2][-1] if len(shapes) > 1 and shapes[-2] else 0
        return "linears: weight gradients" if inner == tokens else "linears: the other two products"
    if "attention" in name:
        return "attention"
    return next((p for p, keys in PARTS.items() if any(k in name for k in keys)), "the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="42m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    vocab, width, layers, _, hidden = SIZES[options.size]
    tokens = options.batch * options.length
    step = fastlm_step(SIZES[options.size], options.length)

    def run() -> float:
        ids = torch.randint(0, vocab, (options.batch, options.length + 1))
        start = time.perf_counter()
        step(ids[:, :-1], ids[:, 1:].contiguous())
        return time.perf_counter() - start

    for _ in range(WARM):
        run()
    plain = sorted(run() for _ in range(STEPS))[STEPS // 2]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        profiled = sum(run() for _ in range(STEPS)) / STEPS
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in recorded.key_averages(group_by_input_shape=True):
        part = part_of(event.key, event.input_shapes, tokens)
        seconds[part] += event.self_cpu_time_total / 1e6 / STEPS
        calls[part] += event.count
    matrices = layers * (4 * width * width + 3 * width * hidden)
    flops = {
        "linears: forward": 2 * tokens * matrices,
        "linears: both gradients": 4 * tokens * matrices,
        # where torch's products run
        "linears: weight gradients": 2 * tokens * matrices,
        "linears: the other two products": 4 * tokens * matrices,
        "linear_cross_entropy": 6 * tokens * width * vocab,
        # forward 2 products, backward 5, half of the scores are masked
        "attention": 7 * tokens * options.length * width * layers,
    }
    ceiling = ceilings()["bf16"]
    print(machine())
    print(f"{options.size}, {options.batch} x {options.length}: {plain * 1e3:.0f} ms a step, "
          f"{tokens / plain:.0f} tokens/s; {profiled * 1e3:.0f} ms under the profiler; "
          f"bf16 ceiling {ceiling / 1e12:.2f} TFLOPS")  # fmt: skip
    print("| part | ms | share of the step | share of the bf16 ceiling |\n|---|---|---|---|")
    rows = []
    for part, s in sorted(seconds.items(), key=lambda item: -item[1]):
        share = flops[part] / ceiling / s if part in flops else math.nan
        rows.append({"part": part, "ms": s * 1e3, "of_step": s / profiled, "of_ceiling": share})
        of = "-" if math.isnan(share) else f"{share:.0%}"
        print(f"| {part} | {s * 1e3:.1f} | {s / profiled:.1%} | {of} |")
    total = sum(n for part, n in flops.items() if part in seconds) / ceiling
    print(
        f"| all matrix products at the ceiling | {total * 1e3:.0f} | {total / plain:.0%} | 100% |"
    )
    print(json.dumps({"profile_step": vars(options), "machine": machine(), "rows": [
        {k: None if v != v else v for k, v in r.items()} for r in rows
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
