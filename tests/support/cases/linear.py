"""linear as cases: fastlm's own products, which are bfloat16's, and torch's for other dtypes; with
an activation also oneDNN's.
"""

import contextlib
import math
from collections.abc import Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F

from cases import losses
from cases.base import DTYPES, SLOW, Case, Op, OpCall, Row, Terms, size
from cases.glu import ACTS, activation
from fastlm import backend, ops

FP16 = ("avx512_fp16", "avx512_fp16_emulated")
# asked once: it allocates, which test_allocation.py counts
ISAS = (*backend.cpu_isas(), *FP16)


@contextlib.contextmanager
def fastlm_products(min_rows: tuple[float, float] = (1, 1)) -> Iterator[None]:
    """Use fastlm's own products from `least` rows on, with and without gradients, on every
    instruction set.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.linear.__globals__, "_MIN_ROWS", dict.fromkeys(ISAS, min_rows))
        yield


def slopes(z: torch.Tensor, act: str) -> list[torch.Tensor]:
    """The sizes of the first and the second derivative of an activation."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(activation(z, act).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
    return [first.detach().abs(), second.abs()]


def build(case: Case, dtype: torch.dtype) -> OpCall:
    if dtype != torch.float64 and "dtype" in case:
        dtype = DTYPES[case["dtype"]]
    rows, k, n = case["shape"]
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / math.sqrt(k)).to(dtype)
    bias, act = [torch.randn(n).to(dtype)] if case["bias"] else [], case.get("act")

    def function(x, weight, bias=None):
        if act:  # by the products that ship: oneDNN's apply some
            return ops.linear(x, weight, bias, act=act)
        with fastlm_products():
            return ops.linear(x, weight, bias)

    def plain(x, weight, bias=None):
        y = F.linear(x, weight, bias)
        return activation(y, act) if act else y

    def terms(x, weight, *rest):
        """Sums, of which only the result is rounded; before an activation it is rounded too."""
        bias, upstream = (rest[0], rest[1:]) if case["bias"] else (None, rest)
        sums = losses.logit_size(x, weight, bias)
        dy = upstream[0].abs() if upstream else torch.zeros_like(sums)
        # sums of 32 products are rounded to fp16: 2^-9 of the terms (a ulp is 2^-7, counted twice)
        fp16 = 2**-3 if backend.cpu_isa() in FP16 else 0.0
        if not act:
            sizes = {
                "y": sums, "dx": dy @ weight.abs(), "dweight": dy.mT @ x.abs(), "dbias": dy.sum(0)
            }  # fmt: skip
            return {n: Terms(float32=t, rounded=t * fp16) for n, t in sizes.items()}
        z = F.linear(x, weight, bias)
        (slope, bend), size = slopes(z, act), z.abs()
        tail = size.clamp_max(8)  # as in glu: float32's error of a probability is absolute
        dz, float32 = slope + bend * size, slope + bend * sums + 2 * (1 + tail)
        of_products = losses.product_sizes(x, weight, dy * dz, dy * float32, dtype)
        of_products["dweight"] = of_products.pop("dw")
        y = Terms(slope * size, slope * sums + tail, slope * sums * fp16)
        return {"y": y} | of_products

    return OpCall(
        function, [x, weight, *bias], plain, terms, differentiable=case.get("learns", True),
        library=bool(act) or dtype != torch.bfloat16,
    )  # fmt: skip


def draw(r: Random, isa: str) -> Case:
    while True:
        shape = [size(r, 3000, 1), size(r, 600, 1), size(r, 1500, 1)]
        if math.prod(shape) <= (1e6 if isa in SLOW else 2e7):
            rows, n, k = shape
            shape = [rows, k, n]
            return {"shape": shape, "bias": r.random() < 0.5, "dtype": "bfloat16"}


def case(*shape: int, bias: bool = True) -> Case:
    return {"shape": list(shape), "bias": bias, "dtype": "bfloat16"}


def activated(*shape: int, act: str, bias: bool = True, learns: bool = True) -> Case:
    return {"shape": list(shape), "bias": bias, "act": act, "learns": learns}


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
        **{act: Row(activated(37, 33, 45, act=act)) for act in ACTS},
        # oneDNN's, but for relu2 and float16
        **{
            f"{act}, no gradient": Row(
                activated(210, 33, 45, act=act, learns=False), bits=act == "gelu"
            )
            for act in ACTS
        },
        "silu, no gradient, no bias": Row(
            activated(1, 33, 45, act="silu", bias=False, learns=False)
        ),
        "gelu, no rows": Row(activated(0, 33, 45, act="gelu")),
        "split": Row(case(1500, 71, 130), split=True),
    },
    forced_isas=FP16,
)
