"""rms_norm through csrc/cuda/rms_norm.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, stream
from fastlm.cuda.quantized_linear import Rounded
from fastlm.memory_order import rows_of
from fastlm.ops.quantized_weight import QuantizedWeight

ROUND_BYTES = 48 << 10
"""Longest row that `rms_norm_round` takes, in bytes: it fits the shared memory of every card."""


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if weight.dtype != x.dtype:
        weight = weight.float()
    extension().rms_norm_forward(
        rows_of(x), None if residual is None else rows_of(residual), weight.contiguous(), eps,
        offset, y, h, rstd, stream(x),
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, rstd


def rms_norm_round(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    into: QuantizedWeight,
) -> tuple[Rounded, Tensor]:
    """Compute ``y, h = rms_norm(...)``. Return y as ``quantized_linear(y, into, act_bits=8)``
    rounds it, and h (x without residual).
    """
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if weight.dtype != x.dtype:
        weight = weight.float()
    y = Rounded.empty(x, into.scales, into.group_size)
    extension().rms_norm_round(
        rows_of(x), None if residual is None else rows_of(residual), weight.contiguous(), eps,
        offset, None if residual is None else h, into.qdata, into.scales, into.bits,
        into.group_size, *y[:3], stream(x),
    )  # fmt: skip
    return y, h
