"""linear_cross_entropy against F.linear + F.cross_entropy, eager and compiled, and torch's own
chunked function: loss and gradients of input and weight, and of few rows the loss alone."""

import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

# rows, width, classes, dtype, share of rows ignored
SHAPES = [
    (4096, 512, 32768, torch.bfloat16, 0.0),
    (4096, 512, 32768, torch.bfloat16, 0.6),  # fine-tuning: most of a batch is prompt
    (2048, 512, 32768, torch.float32, 0.0),
    (507, 252, 50257, torch.bfloat16, 0.0),
    (4096, 768, 50304, torch.bfloat16, 0.0),  # GPT-2
    (1024, 1024, 128256, torch.bfloat16, 0.0),
    (64, 577, 128256, torch.bfloat16, 0.0),
    (1, 512, 32768, torch.bfloat16, 0.0),
]
# against eager torch alone
ODD = [
    (rows, width, classes, dtype, 0.0)
    for rows, width, classes in [
        (1, 576, 49152),
        (1, 509, 50257),
        (127, 509, 50257),
        (67, 80, 128256),
    ]
    for dtype in (torch.float32, torch.bfloat16)
]
# the loss alone, as where a text is scored token by token; against eager torch alone
FEW = [
    (rows, width, classes, dtype)
    for rows, width, classes in [(1, 509, 50257), (1, 1024, 128256), (8, 576, 49152)]
    for dtype in (torch.float32, torch.bfloat16)
]
# F.linear_cross_entropy takes 6 s and more a call: on this shape only
WITH_CHUNKED = SHAPES[0]


def eager(x, w, target):
    return F.cross_entropy(F.linear(x, w), target)


def torch_chunked(x, w, target):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, target, options=options)


def shapes() -> list[tuple]:
    """Without bf16 dot products torch takes half a minute for one of the large bf16 calls."""
    held = os.environ.get("ATEN_CPU_CAPABILITY") in ("avx2", "default")
    most = 1e10 if held else math.inf
    return [
        s for s in SHAPES + ODD if s[3] != torch.bfloat16 or math.prod(s[:3]) * (1 - s[4]) <= most
    ]


def losses_alone() -> list[Case]:
    made = []
    for rows, width, classes, dtype in FEW:
        x, target = torch.randn(rows, width).to(dtype), torch.randint(0, classes, (rows,))
        w = (torch.randn(classes, width) * 2 / width**0.5).to(dtype)

        def loss(f, x=x, w=w, target=target):
            with torch.no_grad():
                return f(x, w, target)

        variants = {
            "fastlm": lambda run=loss: run(ops.linear_cross_entropy),
            "torch": lambda run=loss: run(eager),
        }
        name = f"linear_cross_entropy fwd {str(dtype).removeprefix('torch.')}"
        shape = f"{rows} x {width} -> {classes}"
        made.append(Case(name, shape, variants, bytes=w.numel() * w.itemsize))
    return made


def cases() -> list[Case]:
    made = losses_alone()
    for rows, width, classes, dtype, ignored in shapes():
        odd = (rows, width, classes, dtype, ignored) in ODD
        x = torch.randn(rows, width).to(dtype).requires_grad_()
        w = (torch.randn(classes, width) * 2 / width**0.5).to(dtype).requires_grad_()
        target = torch.randint(0, classes, (rows,))
        target[torch.rand(rows) < ignored] = -100
        compiled = torch.compile(eager, dynamic=False)

        def both(f, x=x, w=w, target=target):
            return torch.autograd.grad(f(x, w, target), (x, w))

        def recomputing(x, w, target):
            return ops.linear_cross_entropy(x, w, target, return_lse=True)[0]

        variants = {
            "fastlm": lambda run=both: run(ops.linear_cross_entropy),
            "torch": lambda run=both: run(eager),
        }
        missing = {}
        if not odd:
            variants["torch.compile"] = lambda run=both, c=compiled: run(c)
        if (rows, width, classes, dtype, ignored) == WITH_CHUNKED:
            variants["fastlm (4 products)"] = lambda run=both, f=recomputing: run(f)
            if hasattr(torch.nn, "LinearCrossEntropyOptions"):
                variants["F.linear_cross_entropy"] = lambda run=both: run(torch_chunked)
            else:
                missing["F.linear_cross_entropy"] = "torch >= 2.13"
        kind = "fp32" if dtype == torch.float32 else "bf16"
        made.append(
            Case(
                f"linear_cross_entropy fwd+bwd {str(dtype).removeprefix('torch.')}",
                f"{rows} x {width} -> {classes}" + (f", {ignored:.0%} ignored" if ignored else ""),
                variants,
                flops=3 * 2 * rows * width * classes * (1 - ignored),
                dtype=kind,
                missing=missing,
            )
        )
    return made


if __name__ == "__main__":
    main("linear_cross_entropy", cases)
