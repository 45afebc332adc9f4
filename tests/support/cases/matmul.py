"""a @ b.T in float32, which no public op calls alone: the product under linear and its losses."""

import math
from random import Random

import torch

from cases.base import SLOW, Case, Op, OpCall, Row, size
from fastlm import _cpu


def build(case: Case, dtype: torch.dtype) -> OpCall:
    m, n, k = case["shape"]
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)

    def function(a, b):
        c = torch.empty(m, n)
        _cpu.matmul(a, b, c)
        return c

    def check():
        # fp32 accumulation of k products: relative to the sum of magnitudes
        bound = (a.double().abs() @ b.double().abs().T) * (k + 2) * 2**-24
        assert ((function(a, b).double() - a.double() @ b.double().T).abs() <= bound).all()

    return OpCall(function, [a, b], check=check, differentiable=False)


def draw(r: Random, isa: str) -> Case:
    work = 2e6 if isa in SLOW else 3e7
    while True:
        shape = [size(r, 600, 1), size(r, 600, 1), size(r, 1500, 1)]
        if math.prod(shape) <= work:
            return {"shape": shape}


OP = Op(
    build,
    draw,
    kernels=("cpu",),
    rows={"several tasks": Row({"shape": [403, 301, 130]}, split=True)},
)
