"""The definition of every op in plain PyTorch: what all others are tested against, never optimised.

The functions have the signatures of the operators (`fastlm.ops`), backward included, so that
`use_backend("reference")` runs a whole model on them. They compute in float32, or in float64 when
given float64, and return the input's dtype.
"""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- rms_norm ------------------------------------------------------------------------------------
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps), y = h * rstd * (offset + weight).

    x (N, H) -> y (N, H), h (N, H; empty without residual), rstd (N).
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * (offset + _wide(weight))).to(x.dtype)
    return y, (x.new_empty(0) if residual is None else h), rstd


def rms_norm_backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of h and of the weight; `dh_above` reaches h from the residual stream."""
    g, wide, r = _wide(dy), _wide(h), rstd[:, None]
    gw = g * (offset + _wide(weight))
    dh = r * (gw - wide * r.square() * (gw * wide).mean(-1, keepdim=True))
    if dh_above is not None:
        dh = dh + _wide(dh_above)
    return dh.to(h.dtype), (g * wide * r).sum(0)


# ---- quantized_linear ----------------------------------------------------------------------------
def unpack_rows(qdata: Tensor, bits: int, k: int) -> Tensor:
    """q as int8 (N, K)."""
    if bits == 8:
        return qdata
    nibbles = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2)
    return nibbles[..., :k].to(torch.int8) - 8


def dequantize_rows(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """(..., K) of the rows given; works on any selection of rows, as an embedding look-up makes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_rows(qdata, bits, k).to(wide)

    def expand(t: Tensor) -> Tensor:
        return (
            t.to(wide).repeat_interleave(group_size, -1)[..., :k] if t.shape[-1] > 1 else t.to(wide)
        )

    w = q * expand(scales)
    return (w if zeros is None else w + expand(zeros)).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 activations: q = round(x * (127 / absmax)) and scale = absmax / 127 per row, (N, K) -> q, (N, 1)."""
    wide = _wide(x)
    # an all-zero row divides by 1e-30, which keeps 127 / absmax finite
    absmax = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    # not 127.0 / absmax: torch makes that a reciprocal and a product, which rounds twice
    inverse = torch.full_like(absmax, 127.0) / absmax
    return (wide * inverse).round(), absmax / 127.0


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
    """y = x . W^T + bias; with act_bits 8 the rows of x are rounded to int8 before."""
    wide = _wide(x)
    if act_bits == 8:
        q, scale = quantize_rows(x)
        wide = q * scale
    w = dequantize_rows(qdata, scales, zeros, bits, group_size, x.shape[1], wide.dtype)
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
    wide = _wide(dy)
    w = dequantize_rows(qdata, scales, zeros, bits, group_size, k, wide.dtype)
    return (wide @ w).to(dy.dtype)
