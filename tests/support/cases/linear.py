"""linear as cases: fastlm's own products, which are bfloat16's, and torch's for other dtypes."""

import contextlib
import math
from collections.abc import Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F

from cases.base import DTYPES, Built, Case, Op, Row, Terms, size
from fastlm import backend, ops


@contextlib.contextmanager
def own_products(least: tuple[float, float] = (1, 1)) -> Iterator[None]:
    """Use fastlm's own products from `least` rows on, with and without gradients, on every
    instruction set.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            ops.linear.__globals__, "_LEAST_ROWS", dict.fromkeys(backend.cpu_isas(), least)
        )
        yield


def build(case: Case, dtype: torch.dtype) -> Built:
    if dtype != torch.float64 and "dtype" in case:
        dtype = DTYPES[case["dtype"]]
    rows, k, n = case["shape"]
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / math.sqrt(k)).to(dtype)
    bias = [torch.randn(n).to(dtype)] if case["bias"] else []

    def function(x, weight, bias=None):
        with own_products():
            return ops.linear(x, weight, bias)

    def terms(x, weight, *rest):
        """Sums, of which only the result is rounded."""
        x, weight = x.abs(), weight.abs()
        bias, upstream = (rest[0].abs(), rest[1:]) if case["bias"] else (None, rest)
        sizes = {"y": Terms(float32=F.linear(x, weight, bias))}
        if not upstream:
            return sizes
        dy = upstream[0].abs()
        sums = {"dx": dy @ weight, "dweight": dy.mT @ x, "dbias": dy.sum(0)}
        return sizes | {name: Terms(float32=t) for name, t in sums.items()}

    return Built(function, [x, weight, *bias], F.linear, terms, library=dtype != torch.bfloat16)


def draw(r: Random, isa: str) -> Case:
    while True:
        shape = [size(r, 3000, 1), size(r, 600, 1), size(r, 1500, 1)]
        if math.prod(shape) <= (1e6 if isa in ("scalar", "amx_emulated") else 2e7):
            rows, n, k = shape
            shape = [rows, k, n]
            return {"shape": shape, "bias": r.random() < 0.5, "dtype": "bfloat16"}


def case(*shape: int, bias: bool = True) -> Case:
    return {"shape": list(shape), "bias": bias, "dtype": "bfloat16"}


OP = Op(
    build,
    draw,
    kernels=("cpu",),
    rows={
        "one": Row(case(1, 1, 1)),
        "whole tiles": Row(case(7, 32, 16), bits=True),
        "whole tiles, no bias": Row(case(7, 32, 16, bias=False)),
        "ragged tiles": Row(case(65, 80, 130)),
        "more than a block of rows": Row(case(513, 67, 29), bits=True),
        "more than a chunk of the weight's gradient": Row(case(1030, 48, 33, bias=False)),
        "more than a block of k": Row(case(40, 1100, 70)),
        "split": Row(case(1500, 71, 130), split=True),
    },
)
