"""Time linear_cross_entropy against F.linear + F.cross_entropy, eager and compiled, in bfloat16, in
float32 on the same values and under autocast, and against torch's own chunked function. Measured:
the loss with the gradients of input and weight, and for few rows the loss alone."""

import math
import os

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, forward, gradients, main, short, torch_variants

from fastlm import ops

BF16, FP32 = torch.bfloat16, torch.float32
# rows, width, classes, dtype, share of rows ignored
SHAPES = [
    (4096, 512, 32768, BF16, 0.0),
    (4096, 512, 32768, BF16, 0.6),  # fine-tuning: most of a batch is prompt
    (2048, 512, 32768, FP32, 0.0),
    (507, 252, 50257, BF16, 0.0),
    (4096, 768, 50304, BF16, 0.0),  # GPT-2
    (1024, 1024, 128256, BF16, 0.0),
    (64, 577, 128256, BF16, 0.0),
    (1, 512, 32768, BF16, 0.0),
]
# against eager torch only
ODD = [
    (rows, width, classes, dtype, 0.0)
    for rows, width, classes in [
        (1, 576, 49152),
        (1, 509, 50257),
        (127, 509, 50257),
        (67, 80, 128256),
    ]
    for dtype in (FP32, BF16)
]
# the loss alone, as when a text is scored token by token; against eager torch only
FEW = [
    (rows, width, classes, dtype)
    for rows, width, classes in [(1, 509, 50257), (1, 1024, 128256), (8, 576, 49152)]
    for dtype in (FP32, BF16)
]
# F.linear_cross_entropy takes 6 s or more per call, so it runs on this shape only
WITH_CHUNKED = SHAPES[0]


def eager(x, w, target):
    return F.cross_entropy(F.linear(x, w), target)


compiled = torch.compile(eager, dynamic=False)


def torch_chunked(x, w, target):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, target, options=options)


def four_products(x, w, target):
    return ops.linear_cross_entropy(x, w, target, return_lse=True)[0]


def shapes() -> list[tuple]:
    """The shapes to run. Without bf16 dot products torch takes half a minute for one large bf16
    call, so those shapes are left out."""
    has_limited_isa = os.environ.get("ATEN_CPU_CAPABILITY") in ("avx2", "default")
    max_size = 1e10 if has_limited_isa else math.inf
    return [s for s in SHAPES + ODD if s[3] != BF16 or math.prod(s[:3]) * (1 - s[4]) <= max_size]


def operands(rows: int, width: int, classes: int, dtype: torch.dtype, ignored: float = 0.0):
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    w = (torch.randn(classes, width) * 2 / width**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    return x, w, target


def loss_alone(rows: int, width: int, classes: int, dtype: torch.dtype) -> Case:
    return Case(
        f"linear_cross_entropy fwd {str(dtype).removeprefix('torch.')}",
        f"{rows} x {width} -> {classes}",
        {"fastlm": forward(ops.linear_cross_entropy)} | torch_variants(forward, eager, dtype),
        bytes=classes * width * dtype.itemsize,
        data=lambda: operands(rows, width, classes, dtype),
    )


def of_shape(
    rows: int, width: int, classes: int, dtype: torch.dtype = BF16, ignored: float = 0.0
) -> Case:
    shape = (rows, width, classes, dtype, ignored)
    variants = {"fastlm": gradients(ops.linear_cross_entropy)}
    variants |= torch_variants(gradients, eager, dtype, None if shape in ODD else compiled)
    missing = {}
    if shape == WITH_CHUNKED:
        variants["fastlm (4 products)"] = gradients(four_products)
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            variants["F.linear_cross_entropy"] = gradients(torch_chunked)
        else:
            missing["F.linear_cross_entropy"] = "torch >= 2.13"
    return Case(
        f"linear_cross_entropy fwd+bwd {str(dtype).removeprefix('torch.')}",
        f"{rows} x {width} -> {classes}" + (f", {ignored:.0%} ignored" if ignored else ""),
        variants,
        flops=3 * 2 * rows * width * classes * (1 - ignored),
        dtype=short(dtype),
        missing=missing,
        data=lambda: (*operands(*shape), None),
    )


def shape_cases(rows: int, width: int, classes: int) -> list[Case]:
    return [of_shape(rows, width, classes, dtype) for dtype in (BF16, FP32)]


def cases() -> list[Case]:
    return [*(loss_alone(*shape) for shape in FEW), *(of_shape(*shape) for shape in shapes())]


if __name__ == "__main__":
    main("linear_cross_entropy", cases, shape_cases)
