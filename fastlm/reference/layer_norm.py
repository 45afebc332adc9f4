"""The definition of `layer_norm`."""

import torch
from torch import Tensor

from fastlm.reference.precision import widen


def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute h = x + residual, z = (h - mean(h)) * rstd and y = z * weight + bias.

    rstd = 1 / sqrt(mean((h - mean(h))^2) + eps). An operand that is None is left out.

    x (..., H), N rows -> y (..., H), h (..., H; empty without residual), mean (N), rstd (N).
    """
    h = x if residual is None else x + residual
    wide = widen(h)
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd
    if weight is not None:
        y = y * widen(weight)
    if bias is not None:
        y = y + widen(bias)
    h_out = x.new_empty(0) if residual is None else h
    return y.to(x.dtype), h_out, mean.reshape(-1), rstd.reshape(-1)


def layer_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (and of the residual), weight and bias, empty where not needed.

    `dh` is the gradient from the residual stream.
    """
    row = (*h.shape[:-1], 1)
    dy, r = widen(dy), rstd.reshape(row)
    z = (widen(h) - mean.reshape(row)) * r
    g = dy if weight is None else dy * widen(weight)
    dx = r * (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + widen(dh)
    none, rows = rstd.new_empty(0), (-1, h.shape[-1])
    dweight = (dy * z).reshape(rows).sum(0) if need_weight else none
    return dx.to(h.dtype), dweight, dy.reshape(rows).sum(0) if need_bias else none.clone()
