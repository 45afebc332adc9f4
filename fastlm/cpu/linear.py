"""linear by csrc/cpu/linear.h, in bfloat16; float32 by tiles of bfloat16, csrc/cpu/linear_split.h.

This file allocates the results, and for each product a workspace of the size that C++ reports.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu


def _matrix(t: Tensor) -> Tensor:
    """Return a matrix (rows, width) with contiguous rows."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _workspace(m: int, n: int, k: int, *, weight_gradient: bool = False) -> Tensor:
    size = _cpu.linear_workspace(m, n, k, weight_gradient) // 4 + 1
    return torch.empty(size, dtype=torch.float32, device="cpu")


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    rows = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    bias = None if bias is None else bias.contiguous()
    workspace = _workspace(rows, n, k)
    _cpu.linear_forward(_matrix(x), _matrix(weight), bias, y.view(rows, n), workspace)
    return y


def linear_split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply float32 matrices, neither empty, by tiles of bfloat16 (AMX)."""
    n, k = weight.shape
    rows = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    bias = None if bias is None else bias.contiguous()
    size = _cpu.linear_split_workspace(rows, n, k) // 4 + 1
    workspace = torch.empty(size, dtype=torch.float32, device="cpu")
    _cpu.linear_split(_matrix(x), _matrix(weight), bias, y.view(rows, n), workspace)
    return y


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape, n = dy.shape[:-1], dy.shape[-1]
    dy = _matrix(dy)
    rows = len(dy)
    dx, dweight = dy.new_empty(0), dy.new_empty(0)
    if weight is not None:
        k = weight.shape[1]
        dx = dy.new_empty(*shape, k)
        _cpu.linear_input_gradient(dy, _matrix(weight), dx.view(rows, k), _workspace(rows, k, n))
    if x is not None:
        k = x.shape[-1]
        dweight = dy.new_empty(n, k)
        workspace = _workspace(rows, n, k, weight_gradient=True)
        _cpu.linear_weight_gradient(dy, _matrix(x), dweight, workspace)
    return dx, dweight, dy.sum(0) if need_bias else dy.new_empty(0)
