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


# ---- adamw ---------------------------------------------------------------------------------------
STATE_BLOCK = 256  # elements that share one scale of an 8-bit state
_CHUNK = 32768  # elements that share one key of random numbers, as in csrc/cpu/adamw_table.h


def pack_state(x: Tensor, *, root: bool) -> tuple[Tensor, Tensor]:
    """Float32 x to (uint8 codes of x's shape, float32 scales of its blocks of 256 in memory order).

    A scale is the block's largest magnitude. A code is the top bits of the float x / scale:

    - a moment (``root=False``): sign bit, then 7 bits of which 3 mantissa, the nearest code;
    - a root (``root=True``, x >= 0): 8 bits of which 4 mantissa; never zero unless x is.
    """
    flat = _flat(x)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    scales = blocks.abs().amax(1)
    # a block that holds one bad value is NaN as a whole, so that it is seen
    scales = torch.where(blocks.isfinite().all(1), scales, torch.nan)
    inverse = torch.where(scales > 1e-37, 1 / scales, torch.zeros_like(scales))
    y = blocks * inverse[:, None]
    mantissa, top = (4, 255) if root else (3, 127)
    shift = 23 - mantissa
    offset = (0x3F800000 >> shift) - top
    magnitude = y.abs()
    codes = ((magnitude.view(torch.int32) + (1 << (shift - 1))) >> shift) - offset
    if root:
        codes = torch.maximum(codes, (magnitude > 0).int())
    else:
        codes = torch.where(codes > 0, codes, (magnitude >= 1.25 * 2**-17).int())
        codes = codes | (torch.signbit(y).int() << 7)
    codes = codes.clamp(0, 255).to(torch.uint8).view(-1)[: flat.numel()]
    return torch.empty_like(x, dtype=torch.uint8).copy_(_unflat(codes, x)), scales


def unpack_state(codes: Tensor, scales: Tensor, *, root: bool) -> Tensor:
    """The float32 values that `pack_state` stands for."""
    flat = _flat(codes).int()
    mantissa, top = (4, 255) if root else (3, 127)
    shift = 23 - mantissa
    offset = (0x3F800000 >> shift) - top
    magnitude = flat if root else flat & 127
    x = ((magnitude + offset) << shift).view(torch.float32)
    x = torch.where(magnitude > 0, x, torch.zeros_like(x))
    if not root:
        x = torch.where(flat >= 128, -x, x)
    x = x * scales.repeat_interleave(STATE_BLOCK)[: x.numel()]
    return torch.empty_like(codes, dtype=torch.float32).copy_(_unflat(x, codes))


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    return flat.as_strided(like.shape, like.stride())


def mix32(x):
    """A bijection of 32-bit integers that looks random (two rounds of xor-shift and multiply)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastic(x: Tensor, key: int) -> Tensor:
    """Dense float32 to bfloat16, up or down with probability by nearness: element i in memory order
    of a tensor always takes the same random number under the same key."""
    flat = _flat(x)
    i = torch.arange(flat.numel(), device=x.device)
    chunk = mix32((key + (i // _CHUNK) * 0x9E3779B9) & 0xFFFFFFFF)
    h = mix32(((i % _CHUNK) * 0x9E3779B9 + chunk) & 0xFFFFFFFF)
    up = flat.view(torch.int32) + (h >> 16).int()
    rounded = torch.where(flat.isfinite(), (up & -65536).view(torch.float32), flat)
    return _unflat(rounded, x).bfloat16()


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor | None],
    exp_avg_sq_scales: list[Tensor | None],
    masters: list[Tensor | None],
    options: list[tuple[float, float, float, float, float, bool, bool]],
    keys: list[int],
    max_grad_norm: float,
    grad_norm: Tensor | None,
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019, arXiv:1711.05101) of every tensor, in place.

    `options` per tensor: lr, beta1, beta2, eps, weight_decay, maximize, stochastic rounding. With
    `grad_norm` (a scalar, written), gradients are scaled as `clip_grad_norm_` would do.
    """
    clip = None
    if grad_norm is not None:
        squares = [_wide(g).double().square().sum().to(grad_norm.device) for g in grads]
        total = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        grad_norm.copy_(total)
        clip = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    for i, param in enumerate(params):
        lr, beta1, beta2, eps, weight_decay, maximize, stochastic = options[i]
        packed, master = exp_avg_scales[i] is not None, masters[i]
        m, v = exp_avgs[i], exp_avg_sqs[i]
        if packed:
            m = unpack_state(m, exp_avg_scales[i], root=False)
            v = unpack_state(v, exp_avg_sq_scales[i], root=True).square()
        g = grads[i].to(m.dtype)
        if clip is not None:
            g = g * clip.to(g.device, g.dtype)
        if maximize:
            g = -g
        steps[i] += 1
        step = steps[i].item()
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w = (param if master is None else master).to(m.dtype)
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
        w = w - (lr * weight_decay * w + lr / (1 - beta1**step) * (m / denominator))
        if master is not None:
            master.copy_(w)
        param.copy_(round_stochastic(w, keys[i]) if stochastic else w)
        if packed:
            codes, scales = pack_state(m, root=False)
            exp_avgs[i].copy_(codes), exp_avg_scales[i].copy_(scales)
            codes, scales = pack_state(v.sqrt(), root=True)
            exp_avg_sqs[i].copy_(codes), exp_avg_sq_scales[i].copy_(scales)
