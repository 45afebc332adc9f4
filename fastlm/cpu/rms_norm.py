"""rms_norm by csrc/cpu/rms_norm.h.

This file allocates the results, one float32 per row, and the partial sums of the weight's gradient.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.memory_order import rows_of


def _weight(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the weight as the kernels accept it: float32 or x's dtype, contiguous."""
    if weight is None:
        return None
    if weight.dtype != dtype and weight.dtype != torch.float32:
        weight = weight.float()
    return weight.contiguous()


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
):
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    h = None if residual is None else x.new_empty(x.shape)
    _cpu.rms_norm_forward(
        rows_of(x), None if residual is None else rows_of(residual), _weight(weight, x.dtype),
        eps, offset, y, h, rstd,
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, rstd


def rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
):
    dx, dw = h.new_empty(h.shape), None
    if weight is not None:
        dw = rstd.new_empty(-(-rstd.numel() // _cpu.RMS_NORM_BLOCK_ROWS), h.shape[-1])
    _cpu.rms_norm_backward(
        rows_of(dy), None if dh is None else rows_of(dh), rows_of(h),
        _weight(weight, h.dtype), rstd, offset, dx, dw,
    )  # fmt: skip
    return dx, rstd.new_empty(0) if dw is None else dw.sum(0)
