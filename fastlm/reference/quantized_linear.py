"""The definition of `quantized_linear`, of its weight's codes and of its int8 activations."""

import torch
from torch import Tensor

from fastlm.reference.precision import widen


def unpack_rows(qdata: Tensor, bits: int, k: int) -> Tensor:
    """q as int8 (N, K)."""
    if bits == 8:
        return qdata
    nibbles = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2)
    return nibbles[..., :k].to(torch.int8) - 8


def dequantize(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """(..., K) of the given rows, which may be any selection, as in an embedding look-up."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_rows(qdata, bits, k).to(wide)

    def expand(t: Tensor) -> Tensor:
        return (
            t.to(wide).repeat_interleave(group_size, -1)[..., :k] if t.shape[-1] > 1 else t.to(wide)
        )

    w = q * expand(scales)
    return (w if zeros is None else w + expand(zeros)).to(dtype)


RUN_MAX = 512  # most columns of int8 activations that share a scale


def round_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 activations: q = round(x * (127 / absmax)) and scale = absmax / 127 per run of a row,
    (N, K) -> q, scale, both (N, K). A run is a group of the weight's columns, split every 512.
    """
    wide = widen(x)
    q, scale = torch.empty_like(wide), torch.empty_like(wide)
    for begin in range(0, x.shape[-1], group_size):
        group = slice(begin, begin + group_size)
        parts = zip(*(t[..., group].split(RUN_MAX, -1) for t in (wide, q, scale)))
        for values, rounded, scales in parts:
            # an all-zero run divides by 1e-30, which keeps 127 / absmax finite
            absmax = values.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            # not 127.0 / absmax: torch computes a reciprocal and a product, which rounds twice
            inverse = torch.full_like(absmax, 127.0) / absmax
            rounded.copy_((values * inverse).round())
            scales.copy_(absmax / 127.0)
    return q, scale


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
    """y = x . W^T + bias; with act_bits 8, x is rounded to int8 first (`round_rows`)."""
    wide = widen(x)
    if act_bits == 8:  # its derivative is that of x: wide - wide.detach() is 0
        q, scale = round_rows(x.detach(), group_size)
        wide = q * scale + (wide - wide.detach())
    w = dequantize(qdata, scales, zeros, bits, group_size, x.shape[-1], wide.dtype)
    y = wide @ w.t()
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def quantized_linear_backward(
    dy: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """dx = dy . W."""
    wide = widen(dy)
    w = dequantize(qdata, scales, zeros, bits, group_size, k, wide.dtype)
    return (wide @ w).to(dy.dtype)
