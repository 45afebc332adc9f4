"""The definition of the AdamW step, of its 8-bit states and of its stochastic rounding."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.reference.precision import widen

# csrc/cpu/adamw_table.h has both numbers, too; tests/kernels/test_adamw.py compares them
STATE_BLOCK = 256  # elements that share one scale of an 8-bit state
RANDOM_CHUNK = 32768  # elements that share one key of random numbers


def pack_state(x: Tensor, *, root: bool) -> tuple[Tensor, Tensor]:
    """Pack float32 x into uint8 codes of x's shape and float32 scales of its blocks of 256 elements
    in memory order.

    A scale is the block's largest magnitude. A code is the top bits of the float x / scale:

    - a moment (``root=False``): sign bit, then 7 bits, 3 of them mantissa; the nearest code;
    - a root (``root=True``, x >= 0): 8 bits, 4 of them mantissa; never zero unless x is.
    """
    flat = _flat(x)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    scales = blocks.abs().amax(1)
    # one bad value makes its whole block NaN, so that it cannot go unnoticed
    scales = torch.where(blocks.isfinite().all(1), scales, torch.nan)
    inverse = torch.where(scales > 1e-37, 1 / scales, torch.zeros_like(scales))
    y = blocks * inverse[:, None]
    mantissa, max_code = (4, 255) if root else (3, 127)
    shift = 23 - mantissa
    offset = (0x3F800000 >> shift) - max_code
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
    """Return the float32 values of `pack_state`'s codes and scales."""
    flat = _flat(codes).int()
    mantissa, max_code = (4, 255) if root else (3, 127)
    shift = 23 - mantissa
    offset = (0x3F800000 >> shift) - max_code
    magnitude = flat if root else flat & 127
    x = ((magnitude + offset) << shift).view(torch.float32)
    x = torch.where(magnitude > 0, x, torch.zeros_like(x))
    if not root:
        x = torch.where(flat >= 128, -x, x)
    x = x * scales.repeat_interleave(STATE_BLOCK)[: x.numel()]
    return torch.empty_like(codes, dtype=torch.float32).copy_(_unflat(x, codes))


def _flat(x: Tensor) -> Tensor:
    """Return the elements of a dense tensor in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    return flat.as_strided(like.shape, like.stride())


def mix32(x):
    """Map 32-bit integers one to one to random-looking ones (two xor-shift-multiply rounds)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastic(x: Tensor, key: int) -> Tensor:
    """Round dense float32 to one of the two neighbouring bfloat16, at random.

    The probability is proportional to nearness. Element i of a tensor, in memory order, gets the
    same random number for the same key.
    """
    flat = _flat(x)
    i = torch.arange(flat.numel(), device=x.device)
    chunk = mix32((key + (i // RANDOM_CHUNK) * 0x9E3779B9) & 0xFFFFFFFF)
    h = mix32(((i % RANDOM_CHUNK) * 0x9E3779B9 + chunk) & 0xFFFFFFFF)
    up = flat.view(torch.int32) + (h >> 16).int()
    rounded = torch.where(flat.isfinite(), (up & -65536).view(torch.float32), flat)
    return _unflat(rounded, x).bfloat16()


def step_key(seed: int, ordinal: int, step: int) -> int:
    """Return the key of a tensor's random numbers in the step after `step` others. `ordinal` is the
    tensor's position in the optimizer."""
    key = mix32((seed ^ 0x9E3779B9) & 0xFFFFFFFF)
    return mix32(mix32(key ^ step) ^ ordinal)


def join_master(param: Tensor, low: Tensor) -> Tensor:
    """Return the float32 master of a bfloat16 parameter and its 16 lower bits (int16).

    The lower bits of a zero do not count: a parameter that the user set to zero still has those of
    the last step.
    """
    high = param.view(torch.int16).int() << 16
    return (high + low.int().masked_fill(param == 0, 0)).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split each float32 into the nearest bfloat16 (ties away from zero) and the lower 16 bits.

    The lower bits are a signed number. Added to the bfloat16's bits, they give the float32.
    """
    master = torch.where(master.isnan(), torch.nan, master)  # a single NaN, which cannot round up
    bits = master.view(torch.int32)
    high = ((bits + 0x8000) >> 16).short().view(torch.bfloat16)
    return high, bits.short()


class AdamWOptions(NamedTuple):
    """The options of a tensor's update."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    stochastic: bool  # round a bfloat16 parameter by `round_stochastic`


class AdamWTensor(NamedTuple):
    """A parameter and the tensors of its step: n dense elements each, in the same order."""

    param: Tensor
    grad: Tensor
    step: Tensor  # () float32: steps so far
    exp_avg: Tensor  # the moments: float32 (float64 of float64), or codes of `pack_state`
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None  # of the codes
    exp_avg_sq_scale: Tensor | None
    # float32 of a float16 parameter; the lower half of `split_master` of a bfloat16 one
    master: Tensor | None
    options: AdamWOptions
    seed: int  # 32 bits; with `ordinal` and `step`, for `step_key`
    ordinal: int


def adamw(
    tensors: list[AdamWTensor], max_grad_norm: float, grad_norm: Tensor | None, have_norm: bool
) -> None:
    """Take one AdamW step (Loshchilov and Hutter 2019, arXiv:1711.05101) of all tensors, in place.

    With `grad_norm` (a scalar, written unless `have_norm`), gradients are scaled as
    `clip_grad_norm_` would scale them.
    """
    clip = None
    if grad_norm is not None:
        if not have_norm:
            squares = [widen(t.grad).double().square().sum().to(grad_norm.device) for t in tensors]
            grad_norm.copy_(torch.stack(squares).sum().sqrt() if squares else torch.zeros(()))
        clip = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    for t in tensors:
        _step(t, clip)


def _step(t: AdamWTensor, clip: Tensor | None) -> None:
    param, master, m, v = t.param, t.master, t.exp_avg, t.exp_avg_sq
    m_scale, v_scale = t.exp_avg_scale, t.exp_avg_sq_scale
    lr, beta1, beta2, eps, weight_decay, maximize, stochastic = t.options
    lr = float(lr)
    if m_scale is not None and v_scale is not None:
        m = unpack_state(m, m_scale, root=False)
        v = unpack_state(v, v_scale, root=True).square()
    g = t.grad.to(m.dtype)
    if clip is not None:
        g = g * clip.to(g.device, g.dtype)
    if maximize:
        g = -g
    t.step.add_(1)
    step = t.step.item()
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    split = master is not None and master.dtype == torch.int16
    w = param if master is None else join_master(param, master) if split else master
    w = w.to(m.dtype)
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    w = w - (lr * weight_decay * w + lr / (1 - beta1**step) * (m / denominator))
    if split and master is not None:
        param_bits, master_bits = split_master(w)
        param.copy_(param_bits)
        master.copy_(master_bits)
    else:
        if master is not None:
            master.copy_(w)
        if stochastic:
            w = round_stochastic(w, step_key(t.seed, t.ordinal, int(step) - 1))
        param.copy_(w)
    if m_scale is not None and v_scale is not None:
        states = ((m, t.exp_avg, m_scale, False), (v.sqrt(), t.exp_avg_sq, v_scale, True))
        for x, codes, scales, root in states:
            for old, new in zip((codes, scales), pack_state(x, root=root)):
                old.copy_(new)
