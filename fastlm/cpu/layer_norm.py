"""layer_norm by csrc/cpu/layer_norm.h.

This file allocates the results and the partial sums of the gradients of weight and bias.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.memory_order import empty_rows, rows_of


def _parameters(dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None):
    """Return weight and bias as the kernels accept them: contiguous, both float32 or x's dtype."""
    if (weight is not None and weight.dtype != dtype) or (bias is not None and bias.dtype != dtype):
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
):
    y, rows = empty_rows(x), x.numel() // x.shape[-1]
    h = None if residual is None else empty_rows(x)
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    _cpu.layer_norm_forward(
        rows_of(x), None if residual is None else rows_of(residual),
        *_parameters(x.dtype, weight, bias), eps, y, h, mean, rstd,
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, mean, rstd


def layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_weight: bool, need_bias: bool,
):  # fmt: skip
    dx, width = empty_rows(h), h.shape[-1]
    dweight = rstd.new_empty(width if need_weight else 0)
    dbias = rstd.new_empty(width if need_bias else 0)
    blocks = -(-rstd.numel() // _cpu.LAYER_NORM_BLOCK_ROWS)
    partial = rstd.new_empty((need_weight + need_bias) * blocks * width)
    _cpu.layer_norm_backward(
        rows_of(dy), None if dh is None else rows_of(dh), rows_of(h),
        *_parameters(h.dtype, weight, None)[:1], mean, rstd, dx,
        dweight if need_weight else None, dbias if need_bias else None, partial,
    )  # fmt: skip
    return dx, dweight, dbias
