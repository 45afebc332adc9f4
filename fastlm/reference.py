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
