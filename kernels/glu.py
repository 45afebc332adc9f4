"""y = act(gate) * up, or act(gate) where up is None, forward and backward.

Each operand is read once and each result written once.

Rows may have any stride (`gate` and `up` as halves of one projection); the elements of a row are
contiguous. A program handles BLOCK elements of one row; contiguous operands count as a single row.

    program row * blocks + block:   gate[row, block * BLOCK ..]  ->  y[row, block * BLOCK ..]

Activations are float32. tanh is 1 - 2 / (e^2x + 1): the backend's tanh differs between versions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config, launch
from fastlm.memory_order import matrix

ACTS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu2": 3}
# 8 16-bit elements per thread: one 128-bit access per operand
_CONFIG = Config({"BLOCK": 2048}, num_warps=8)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _value_and_slope(x, ACT: tl.constexpr):
    """Return act(x) and act'(x)."""
    if ACT == 0:
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif ACT == 1:
        c: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
        t = _tanh(c * (x + 0.044715 * x * x * x))
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 0.134145 * x * x)
    elif ACT == 3:
        positive = tl.where(x < 0.0, 0.0, x)  # NaN stays
        value = positive * positive
        slope = 2.0 * positive
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return value, slope


@triton.jit
def _forward(
    gate,  # (rows, width), row stride gate_stride
    up,  # likewise, or None
    y,  # (rows, width), contiguous
    width,
    blocks,  # per row
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    HAS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    x = tl.load(gate + row * gate_stride + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_UP:
        u = tl.load(up + row * up_stride + at, mask=mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(x, ACT)
    if HAS_UP:
        value = value * u
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy,  # (rows, width), row stride dy_stride
    gate,
    up,
    dgate,  # (rows, width), contiguous
    dup,
    width,
    blocks,
    dy_stride,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    HAS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    g = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_UP:
        u = tl.load(up + row * up_stride + at, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(x, ACT)
    if HAS_UP:
        tl.store(dgate + row * width + at, (g * u * slope).to(dgate.dtype.element_ty), mask=mask)
        tl.store(dup + row * width + at, (g * value).to(dup.dtype.element_ty), mask=mask)
    else:
        tl.store(dgate + row * width + at, (g * slope).to(dgate.dtype.element_ty), mask=mask)


def _rows(*tensors: Tensor | None) -> tuple[int, int, list[Tensor | None], list[int]]:
    """The number of rows, the width, the operands with contiguous rows, and their row strides."""
    first = next(t for t in tensors if t is not None)
    if all(t is None or t.is_contiguous() for t in tensors):
        return 1, first.numel(), list(tensors), [0] * len(tensors)
    flat = [None if t is None else matrix(t) for t in tensors]
    return *matrix(first).shape, flat, [0 if t is None else t.stride(0) for t in flat]


def glu_forward(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width, (g, u), strides = _rows(gate, up)
    blocks = triton.cdiv(width, _CONFIG.sizes["BLOCK"])
    launch(
        _forward, (rows * blocks,), g, u, y, width, blocks, *strides, config=_CONFIG,
        ACT=ACTS[act], HAS_UP=up is not None,
    )  # fmt: skip
    return y


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate) if up is not None else dgate.new_empty(0)
    rows, width, (d, g, u), strides = _rows(dy, gate, up)
    blocks = triton.cdiv(width, _CONFIG.sizes["BLOCK"])
    launch(
        _backward, (rows * blocks,), d, g, u, dgate, dup, width, blocks, *strides,
        config=_CONFIG, ACT=ACTS[act], HAS_UP=up is not None,
    )  # fmt: skip
    return dgate, dup
