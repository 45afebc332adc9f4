"""quantized_linear and dequantize by csrc/cpu/quantized.

This file allocates the results, and a workspace of the size that C++ reports.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.memory_order import rows_of

_ROW_ON_STACK = _cpu.QUANTIZED_ROW_ON_STACK if _cpu else 0  # columns that need no workspace


def quantized_linear_forward(
    x: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    y = x.new_empty(*x.shape[:-1], qdata.shape[0])
    if bias is not None:
        bias = bias.float().contiguous()
    x = rows_of(x)
    workspace = None
    if x.numel() > _ROW_ON_STACK or x.numel() != x.shape[-1]:
        size = _cpu.quantized_linear_workspace(x, qdata.shape[0], bits, group_size, act_bits, 0)
        if size:
            workspace = x.new_empty(size, dtype=torch.float32)
    _cpu.quantized_linear(
        x, qdata, scales, zeros, bias, bits, group_size, act_bits, 0, y, workspace
    )
    return y


def quantized_linear_backward(
    dy: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    dx = dy.new_empty(*dy.shape[:-1], k)
    dy = rows_of(dy)
    workspace = dy.new_empty(_cpu.quantized_linear_backward_workspace(dy), dtype=torch.float32)
    _cpu.quantized_linear_backward(dy, qdata, scales, zeros, bits, group_size, dx, workspace)
    return dx


def dequantize(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    out = qdata.new_empty(qdata.shape[0], k, dtype=dtype)
    _cpu.dequantize(qdata, scales, zeros, bits, group_size, out)
    return out
