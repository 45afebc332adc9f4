"""The definition of every op in plain PyTorch: what all others are tested against, never optimised.

The functions have the signatures of the operators (`fastlm.ops`), backward included, so that
`use_backend("reference")` runs a whole model on them. They compute in float32, or in float64 when
given float64, and return the input's dtype.
"""

import math

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


# ---- rope ----------------------------------------------------------------------------------------
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y = x * cos + rotate(x) * sin on the first R = cos.shape[-1] of D elements, for q and k;
    `inverse` is the transposed map x * cos + rotate^T(x * sin) with rotate^T = -rotate.

    q (B, H, S, D), k (B, Hkv, S, D), cos and sin (S, R), (1, S, R) or (B, S, R).
    """

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def apply(x: Tensor) -> Tensor:
        wide, y = _wide(x), torch.empty_like(x)
        c, s = (t.to(wide.dtype).unsqueeze(-3) for t in (cos, sin))
        part, rest = wide.tensor_split((cos.shape[-1],), -1)
        turned = part * c - rotate(part * s) if inverse else part * c + rotate(part) * s
        return y.copy_(torch.cat((turned, rest), -1))

    return apply(q), apply(k)


# ---- glu -----------------------------------------------------------------------------------------
def _activation(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """y = act(gate) * up, elementwise."""
    return (_activation(_wide(gate), act) * _wide(up)).to(gate.dtype).contiguous()


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dgate = dy * up * act'(gate), dup = dy * act(gate)."""
    g, x, u = _wide(dy), _wide(gate), _wide(up)
    if act == "silu":
        s = torch.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    elif act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        value = x * cdf
        slope = cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        value = 0.5 * x * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * c * (1 + 3 * 0.044715 * x.square())
    return (g * u * slope).to(gate.dtype).contiguous(), (g * value).to(gate.dtype).contiguous()
