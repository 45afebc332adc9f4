"""rms_norm through csrc/cpu/rms_norm.h. Allocates the results, one float32 per row, and the partial
sums of the weight's gradient.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu

_BLOCK_ROWS = 64  # rows per partial sum of the weight's gradient, as in csrc/cpu/rms_norm.h


def _rows(t: Tensor | None) -> Tensor | None:
    """Return t as kernels accept it: contiguous, or a matrix of contiguous rows at any stride."""
    if t is None or t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight as the kernels accept it: float32 or x's dtype, contiguous."""
    if weight.dtype != dtype and weight.dtype != torch.float32:
        weight = weight.float()
    return weight.contiguous()


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float):
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    h = None if residual is None else x.new_empty(x.shape)
    _cpu.rms_norm_forward(
        _rows(x), _rows(residual), _weight(weight, x.dtype), eps, offset, y, h, rstd
    )
    return y, x.new_empty(0) if h is None else h, rstd


def backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
):
    dx = h.new_empty(h.shape)
    blocks = (rstd.numel() + _BLOCK_ROWS - 1) // _BLOCK_ROWS
    dw = rstd.new_empty(blocks, h.shape[-1])
    _cpu.rms_norm_backward(
        _rows(dy), _rows(dh_above), _rows(h), _weight(weight, h.dtype), rstd, offset, dx, dw
    )
    return dx, dw.sum(0)
