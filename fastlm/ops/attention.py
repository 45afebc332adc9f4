"""Softmax attention that never holds the (S, T) scores (Dao et al. 2022, arXiv:2205.14135).

Every option works with every other. The three ops `attention`, `varlen_attention` and
`paged_attention` differ in how queries and keys are arranged; they share `check_options` here and
one body each in C++ and in Triton.

Dropout draws from Philox4x32-10 (Salmon et al. 2011) on (seed, batch, head, row, key): the backward
redraws the forward's mask instead of storing it, and every backend draws the same. The seed is a
one-element tensor from ``torch.randint``. Under torch.compile it is one more node of the graph, and
on a GPU nothing waits for it. Rejected: an int (``.item()`` breaks the graph) and the state of
torch's generator (it differs between devices).
"""

import math
from typing import Never

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import Kernel
from fastlm.cpu import attention as cpu
from fastlm.errors import InputError
from fastlm.memory_order import elements_last, empty_out
from fastlm.operator import autocast, autocast_somewhere, register
from fastlm.ops.wrong_type import FAILURES, explained

# sinks, alibi_slopes, bias, causal, scale, window, softcap as operators expect them: 0 means none.
# A plain tuple: a named one costs 0.4 us, a twentieth of a decode call.
Options = tuple[Tensor | None, Tensor | None, Tensor | None, bool, float, int, float]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention(q, k, v, enable_gqa=True)`` with these options, in order::

        s = scale * (q @ k.mT)                           scale: 1 / sqrt(D) by default
        s = softcap * tanh(s / softcap)
        s = s - alibi_slopes[:, None, None] * |i - j|    aligned: the last query at the last key
        s = s + bias
        s = s where j <= i (causal), 0 <= i - j < window, else -inf
        lse = logsumexp(s and the head's sink)
        out = dropout(exp(s - lse)) @ v

    Args:
        q: (B, H, S, D), k: (B, Hkv, T, D), v: (B, Hkv, T, Dv), one dtype: float32, bfloat16 or
            float16 (float64 on the reference). H is a multiple of Hkv: query head h reads key head
            h // (H / Hkv). Any strides.
        sinks: (H,), one more logit per head in the denominator (differentiable).
        alibi_slopes: (H,); constants, no gradient.
        bias: float, broadcast to (B, H, S, T) (differentiable); or bool, True where a key is seen.
        dropout_p: chance that a probability is dropped; the seed comes from torch's generator.
        return_lse: also return lse (B, H, S), float32 (differentiable).
        unknown: refused, torch's names with the one that they have here.

    Under ``torch.autocast`` q, k and v are cast to its dtype, as by torch's own attention.

    A row that sees no key is zero, its lse is -inf and its gradients are zero. Memory beyond the
    outputs: a packed copy of keys and values, never S x T. The backward keeps out and lse and
    recomputes the rest.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or an option is out of range.
    """
    try:
        if unknown:
            raise _unknown_argument(next(iter(unknown)))
        if autocast_somewhere():
            q, k, v = autocast(q, k, v)
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
            name, t = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.dim() != 4)
            raise InputError(
                f"{name}: wanted 4 dimensions (B, heads, length, D), got {tuple(t.shape)}"
            )
        batch, heads, queries, _ = q_shape
        kv_batch, kv_heads, keys, _ = k_shape
        v_batch, v_heads, v_keys, _ = v_shape
        if not (kv_batch == v_batch == batch and v_heads == kv_heads and v_keys == keys):
            raise InputError(
                f"k, v: wanted (B, Hkv, T, D), (B, Hkv, T, Dv) with B = {batch} as q,"
                f" got {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if sinks is alibi_slopes is bias is window is softcap is None and dropout_p == 0:
            check_tensors(q, k, v, heads, kv_heads)
            scale = 1 / math.sqrt(q_shape[3]) if scale is None else float(scale)
            out, lse = _forward(q, k, v, None, None, None, None, causal, scale, 0, 0.0, 0.0)
        else:
            sinks, alibi_slopes, bias, *numbers = check_options(
                q, k, v, heads, kv_heads, causal, scale, window, softcap, sinks, alibi_slopes, bias,
                (batch, heads, queries, keys),
            )  # fmt: skip
            seed = dropout_seed(dropout_p, q)
            out, lse = _forward(
                q, k, v, sinks, alibi_slopes, bias, seed, *numbers, float(dropout_p)
            )
        return (out, lse) if return_lse else out
    except FAILURES as error:
        raise explained(error, attention, locals()) from None


# arguments of torch's F.scaled_dot_product_attention: what does the same here
_OF_TORCH = {
    "attn_mask": "bias (floats, or bool: True where a key is seen)",
    "is_causal": "causal (which aligns the last query with the last key)",
    "enable_gqa": "no such argument (always on)",
}


def _unknown_argument(name: str) -> InputError:
    keywords = ", ".join(attention.__kwdefaults__ or ())
    return InputError(f"{name}: expected {_OF_TORCH.get(name, f'one of {keywords}')}, got {name}")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    kv_dtypes: tuple[torch.dtype, ...] = (),
) -> None:
    """Check q, k and v. `kv_dtypes`: dtypes that k and v may have besides q's."""
    if not q.is_floating_point():
        raise InputError(f"q: wanted a float dtype, got {q.dtype}")
    dtype, device = q.dtype, q.device
    if not (
        k.dtype == v.dtype == dtype
        and ((q.is_cpu and k.is_cpu and v.is_cpu) or k.device == v.device == device)
    ):
        for name, t in (("k", k), ("v", v)):
            if t.dtype != dtype and t.dtype not in kv_dtypes:
                raise InputError(f"{name}: wanted {dtype} as q, got {t.dtype}")
            if t.device != device:
                raise InputError(f"{name}: wanted device {device} as q, got {t.device}")
    width = q.shape[-1]
    if width == 0 or k.shape[-1] != width:
        raise InputError(f"k: wanted head width D = {width} >= 1 as q, got k {tuple(k.shape)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise InputError(f"q: wanted heads a multiple of k's {kv_heads}, got {heads}")


def check_options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    bias_shape: tuple[int, ...],
    *,
    kv_dtypes: tuple[torch.dtype, ...] = (),
) -> Options:
    """Check the arguments that the three ops share, tensors included."""
    check_tensors(q, k, v, heads, kv_heads, kv_dtypes)
    device, width = q.device, q.shape[-1]
    given = (
        () if sinks is alibi_slopes is None else (("sinks", sinks), ("alibi_slopes", alibi_slopes))
    )
    for name, t in given:
        if t is None:
            continue
        if t.shape != (heads,) or not t.is_floating_point() or t.device != device:
            raise InputError(
                f"{name}: wanted ({heads},) floats on {device}, one a head,"
                f" got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise InputError(
            "alibi_slopes: wanted constants (detach them), got a tensor that requires grad"
        )
    if bias is not None:
        bias = _bias_4d(q, bias, bias_shape)
    if window is not None and window < 1:
        raise InputError(f"window: wanted at least 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap: wanted above 0 or None, got {softcap}")
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    return sinks, alibi_slopes, bias, causal, scale, window or 0, softcap or 0.0


def _bias_4d(q: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """bias with four dimensions, each 1 or full."""
    fits = bias.dim() <= 4 and all(
        n == 1 or n == full for n, full in zip(bias.shape[::-1], shape[::-1])
    )
    if not fits or bias.device != q.device:
        raise InputError(
            f"bias: wanted to broadcast to {tuple(shape)} on {q.device},"
            f" got {tuple(bias.shape)} on {bias.device}"
        )
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -math.inf)
    if not bias.is_floating_point():
        raise InputError(f"bias: wanted float or bool, got {bias.dtype}")
    return bias[(None,) * (4 - bias.dim())]


def dropout_seed(dropout_p: float, q: Tensor) -> Tensor | None:
    """(1,) int64 from torch's generator, or None without dropout."""
    if not 0 <= dropout_p <= 1:
        raise InputError(f"dropout_p: wanted 0 to 1, got {dropout_p}")
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def as_int32(t: Tensor) -> Tensor:
    """Offsets, lengths, pages or positions as the kernels expect them. A value beyond int32 becomes
    the nearest end of its range, which no tensor reaches: it is refused or left out, not wrapped.
    """
    return t if t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).int()


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(q, k, v, sinks, alibi_slopes, bias, seed, *_):
    (q,) = elements_last(q)
    return empty_out(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


def backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    """Shapes of the gradients; `rest` is sinks, alibi_slopes, bias, seed and the numbers."""
    sinks, bias, bias_grad = rest[0], rest[2], rest[-1]
    return (
        *(t.new_empty(t.shape) for t in (q, k, v)),
        lse.new_empty(0 if sinks is None else sinks.shape[0]),
        lse.new_empty(bias.shape if bias is not None and bias_grad else (0,)),
    )


def _backward_fake(dout, dlse, q, k, v, *rest):
    """Gradients in the memory order of q, k and v, for the same reason as `empty_out`."""
    _, _, _, dsinks, dbias = backward_fake(dout, dlse, q, k, v, *rest)
    return *(torch.empty_like(t) for t in elements_last(q, k, v)), dsinks, dbias


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, *rest):
    out, lse = reference.attention_forward(q, k, v, *rest)
    (q,) = elements_last(q)
    return empty_out(q, v.shape[3]).copy_(out), lse


def _reference_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest):
    *grads, dsinks, dbias = reference.attention_backward(dout, dlse, q, k, v, *rest)
    inputs = elements_last(q, k, v)
    return *(torch.empty_like(t).copy_(g) for t, g in zip(inputs, grads)), dsinks, dbias


def _setup_context(ctx, inputs, output):
    q, k, v, sinks, alibi_slopes, bias, seed, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, alibi_slopes, bias, seed)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout, dlse):
    saved = ctx.saved_tensors
    _, _, _, out, _, sinks, _, bias, _ = saved
    if dout is None:
        dout = torch.zeros_like(out)
    bias_grad = bias is not None and ctx.needs_input_grad[5]
    dq, dk, dv, dsinks, dbias = _backward(dout, dlse, *saved, *ctx.numbers, bias_grad)
    return (
        dq,
        dk,
        dv,
        None if sinks is None else dsinks.to(sinks.dtype),
        None,
        None if bias is None or not bias_grad else dbias.to(bias.dtype),
        *(None,) * 6,  # seed, the numbers
    )


def _flops(q, k, v, *_, **__):
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


def _backward_flops(dout, dlse, q, k, v, *_, **__):
    """Width D: scores again, dq and dk. Width Dv: the probabilities' gradients and dv."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (3 * width + 2 * v[3])


NUMBERS = "bool causal, float scale, SymInt window, float softcap"
_forward = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias,"
    f" Tensor? seed, {NUMBERS}, float dropout_p) -> (Tensor, Tensor)",
    fake=_forward_fake,
    implementations={
        "reference": _reference_forward,
        "cpu": cpu.forward,
        "triton": Kernel("attention", "attention_forward"),
    },
    setup_context=_setup_context,
    backward=_autograd_backward,
    flops=_flops,
)
_backward = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? seed,"
    f" {NUMBERS}, float dropout_p, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": _reference_backward,
        "cpu": cpu.backward,
        "triton": Kernel("attention_backward", "attention_backward"),
    },
    picked_by=2,
    flops=_backward_flops,
)
