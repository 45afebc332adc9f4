"""The definition of `rms_norm`."""

import torch
from torch import Tensor

from fastlm.reference.precision import widen
from fastlm.reference.quantized_linear import int8_rows


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps), y = h * rstd * (offset + weight),
    without a weight y = h * rstd.

    x (..., H) -> y (..., H), h (..., H; empty without residual), rstd (...).
    """
    h = x if residual is None else x + residual
    wide = widen(h)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd[..., None]
    if weight is not None:
        y = y * (offset + widen(weight))
    return y.to(x.dtype), (x.new_empty(0) if residual is None else h), rstd


def rms_norm_round(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    qdata: Tensor,
    scales: Tensor,
    eps: float,
    offset: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `int8_rows` of the norm, for `rounded_linear` with the weight (qdata, scales), and h
    (empty without residual)."""
    y, h, _ = rms_norm_forward(x, residual, weight, eps, offset)
    return *int8_rows(y, bits, group_size), h


def rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (and of the residual) and of the weight (empty without one). `dh`
    is the gradient from the residual stream."""
    g, wide, r = widen(dy), widen(h), rstd[..., None]
    gw = g if weight is None else g * (offset + widen(weight))
    dx = r * (gw - wide * r.square() * (gw * wide).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + widen(dh)
    if weight is None:
        return dx.to(h.dtype), rstd.new_empty(0)
    return dx.to(h.dtype), (g * wide * r).reshape(-1, h.shape[-1]).sum(0)
