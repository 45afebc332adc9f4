"""Ops that return their result in int8, as quantized_linear rounds it, as cases: those of the op
without rounding, whose function also compares the rows in int8 and their product, bit for bit.
"""

import inspect
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from cases import glu, rms_norm
from cases.base import Case, Op, OpCall, Row, assert_same, random_shape
from fastlm import QuantizedWeight, backend, ops, reference
from fastlm.ops.glu import glu_round
from fastlm.ops.quantized_linear import rounded_linear
from fastlm.ops.rms_norm import rms_norm_round

N = 5  # outputs of the product


def with_rounding(case: Case, op: OpCall, round_: Callable[..., tuple[Tensor, ...]]) -> OpCall:
    """Add the comparison of the rounded rows to a call. `round_` maps the leaves by their names and
    a weight to int8 rows and the op's other results.
    """
    k = case["shape"][-1]
    drawn = ops.quantize_weight(torch.randn(N, k), case["bits"], group_size=case["group_size"])

    def function(*tensors):
        codes = (t.to(tensors[0].device) for t in (drawn.qdata, drawn.scales))
        weight = QuantizedWeight(*codes, None, drawn.bits, drawn.group_size, (N, k))
        *rows, h = round_(dict(zip(names, tensors)), weight)
        results = op.function(*tensors)
        x, expected_h = results if isinstance(results, tuple) else (results, results.new_empty(0))
        count, expected = x.numel() // k, reference.int8_rows(x, weight.bits, weight.group_size)
        assert [(t.shape, t.dtype) for t in rows] == [(t.shape, t.dtype) for t in expected]
        # scales have room for more rows, which is not compared
        int8_rows = [[t[0], *(s[:, :count] for s in t[1:])] for t in (expected, rows)]
        assert_same([*int8_rows[0], expected_h], [*int8_rows[1], h], "rounded")
        codes = weight.qdata, weight.scales, None, None
        codes += weight.bits, weight.group_size, k, x.dtype
        assert_same([product(x, weight)], [rounded_linear(*rows, *codes)], "product")
        with backend.use_backend("reference"):
            expected_product = rounded_linear(*expected, *codes)
            assert_same([product(x, weight)], [expected_product], "the definition's")
        return results

    names = inspect.signature(op.function).parameters
    return op._replace(function=function, differentiable=False)


def product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return ops.quantized_linear(x, weight, act_bits=8).reshape(-1, N)


def build_glu(case: Case, dtype: torch.dtype) -> OpCall:
    def round_(leaves, weight):
        gate, up, none = leaves["gate"], leaves["up"], torch.empty(0, dtype=dtype)
        options = weight.qdata, weight.scales, case["act"], weight.bits, weight.group_size
        return *glu_round(gate, up, *options), none.to(gate.device)

    return with_rounding(case, glu.build(case, dtype), round_)


def build_rms_norm(case: Case, dtype: torch.dtype) -> OpCall:
    eps, offset = case["options"]["eps"], case["options"]["offset"]

    def round_(leaves, weight):
        tensors = leaves["x"], leaves.get("residual"), leaves["weight"], weight.qdata, weight.scales
        return rms_norm_round(*tensors, eps, offset, weight.bits, weight.group_size)

    return with_rounding(case, rms_norm.build(case, dtype), round_)


def draw_format(r: Random, isa: str) -> Case:
    return {"bits": r.choice([4, 8]), "group_size": r.choice([8, 24, 32, 128, 512, 1024, -1])}


def draw_glu(r: Random, isa: str) -> Case:
    drawn = glu.draw(r, isa) | {"shape": random_shape(r, isa, 1 << 12, 1)}
    return drawn | draw_format(r, isa)


def draw_rms_norm(r: Random, isa: str) -> Case:
    drawn = rms_norm.draw(r, isa) | {"weight": r.choice(["wide", "like x"])}
    return drawn | draw_format(r, isa)


# whole and cut runs, several groups, a short last one, one without columns in its second run; in
# vectors and element by element; more runs than warps in a block; rows of a batch
SHAPES = {
    "whole runs": ([3, 512], 128),
    "cut runs": ([1, 2080], 2080),
    "ragged": ([2, 77], 32),
    "rows of a batch": ([5, 1, 40], 8),
    "groups of a run": ([2, 1400], 512),
    "more runs than warps": ([1, 2568], 64),
    "a run without columns": ([3, 1500], 1024),
}


def each_bits(options: Callable[[int, int], Case]) -> dict[str, Row]:
    """A row of each shape for weights of 4 and of 8 bits; `of(number, bits)` has the options."""
    return {
        f"{name}, {bits} bits": Row(
            options(i, bits) | {"shape": shape, "bits": bits, "group_size": group_size},
            on=("cuda",), bits=name == "rows of a batch",
        )
        for i, (name, (shape, group_size)) in enumerate(SHAPES.items())
        for bits in (4, 8)
    }  # fmt: skip


def glu_options(i: int, bits: int) -> Case:
    return {"act": glu.ACTS[(i + bits // 4) % len(glu.ACTS)], "spread": 1.0}


def rms_norm_options(i: int, bits: int) -> Case:
    return {
        "residual": (i + bits // 4) % 2 == 0, "weight": "wide" if i % 3 == 0 else "like x",
        "spread": 1.0, "options": {"eps": 1e-5, "offset": 1.0},
    }  # fmt: skip


GLU = Op(build_glu, draw_glu, kernels=("cuda",), rows=each_bits(glu_options))
RMS_NORM = Op(
    build_rms_norm,
    draw_rms_norm,
    kernels=("cuda",),
    rows=each_bits(rms_norm_options),
    any_strides=("cpu", "triton"),
)
