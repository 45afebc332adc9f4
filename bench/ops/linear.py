"""Time linear against torch's (oneDNN): the layers of the models in bench/train/train_step.py.

As in a training step, no operand but the weight was touched recently: every call uses the next of
COPIES inputs. On operands in the cache the two are equally fast. torch.compile calls the same
library, so torch's variants are eager: in bfloat16, in float32 on the same values, and under
autocast.
"""

import itertools

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, main, with_autocast

from fastlm import ops

COPIES = 8
# rows, K, N: 42 M, 124 M, 350 M, and odd widths
SHAPES = [
    (4096, 512, 512),
    (4096, 512, 1408),
    (4096, 1408, 512),
    (2048, 768, 2048),
    (2048, 2048, 768),
    (1024, 1024, 2816),
    (4093, 509, 1021),
]


def both(f, dtype=torch.bfloat16):
    """Return a variant that computes output and both gradients, on the next inputs at each call."""

    def variant(inputs, weight):
        weight = weight.to(dtype).requires_grad_()
        turns = itertools.cycle([(x.to(dtype).requires_grad_(), dy.to(dtype)) for x, dy in inputs])

        def call():
            x, dy = next(turns)
            y = f(x, weight)
            return torch.autograd.grad(y, (x, weight), dy.to(y.dtype))

        return call

    return variant


def of_shape(rows: int, k: int, n: int) -> Case:
    def data():
        weight = (torch.randn(n, k) / k**0.5).bfloat16()
        return [
            (torch.randn(rows, k).bfloat16(), torch.randn(rows, n).bfloat16())
            for _ in range(COPIES)
        ], weight

    variants = {
        "fastlm": both(ops.linear),
        "torch": both(F.linear),
        "torch fp32": both(F.linear, torch.float32),
        "torch autocast": both(with_autocast(F.linear), torch.float32),
    }
    flops = 3 * 2 * rows * k * n
    return Case("fwd+bwd bf16", f"{rows} x {k} -> {n}", variants, flops=flops, data=data)


def activated(rows: int, k: int, n: int, dtype: torch.dtype, learns: bool) -> Case:
    """The first layer of a GPT-2 MLP with its gelu."""

    def data():
        x, weight = torch.randn(rows, k), torch.randn(n, k) / k**0.5
        tensors = (t.to(dtype).requires_grad_(learns) for t in (x, weight, torch.randn(n)))
        return *tensors, torch.randn(rows, n).to(dtype)

    def variant(f):
        def variant_call(x, weight, bias, dy):
            if not learns:
                return lambda: f(x, weight, bias)
            return lambda: torch.autograd.grad(f(x, weight, bias), (x, weight, bias), dy)

        return variant_call

    variants = {
        "fastlm": variant(lambda *a: ops.linear(*a, act="gelu_tanh")),
        "torch": variant(lambda *a: F.gelu(F.linear(*a), approximate="tanh")),
    }
    passes = "fwd+bwd" if learns else "fwd"
    name = f"linear + gelu_tanh {passes} {str(dtype).removeprefix('torch.')}"
    return Case(name, f"{rows} x {k} -> {n}", variants, data=data)


ACTIVATED = [
    (rows, 768, 3072, dtype, learns)
    for rows in (1, 16, 512, 2048)
    for dtype in (torch.float32, torch.bfloat16)
    for learns in (False, True)
]


def shape_cases(rows: int, k: int, n: int) -> list[Case]:
    return [of_shape(rows, k, n)]


def cases() -> list[Case]:
    return [of_shape(*shape) for shape in SHAPES] + [activated(*shape) for shape in ACTIVATED]


if __name__ == "__main__":
    main("linear", cases, shape_cases)
