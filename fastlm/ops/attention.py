"""Softmax attention that never stores the (S, T) scores (Dao et al. 2022, arXiv:2205.14135).

Every option works with every other. The three ops `attention`, `varlen_attention` and
`paged_attention` differ in how queries and keys are arranged. They share `check_options` here and
one implementation each in C++ and in Triton.

Dropout draws from Philox4x32-10 (Salmon et al. 2011) on (seed, batch, head, row, key): the backward
draws the forward's mask again instead of storing it, and every backend draws the same mask. The
seed is a one-element tensor from ``torch.randint``. Under torch.compile it is one more node of the
graph, and on a GPU nothing waits for it. Rejected: an int (``.item()`` breaks the graph) and the
state of torch's generator (it differs between devices).
"""

import math
from typing import Never

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.memory_order import dense_rows, empty_output
from fastlm.operator import autocast, declare, is_any_autocast_on
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.reference import AttentionOptions

# AttentionOptions(causal, scale) in a third of the time
_new, _NO_OPTIONS = tuple.__new__, tuple(AttentionOptions._field_defaults.values())


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
        bias: float, broadcast to (B, H, S, T) (differentiable); or bool, True where a key is
            visible.
        dropout_p: probability of dropping an attention weight; the seed comes from torch's
            generator.
        return_lse: also return lse (B, H, S), float32 (differentiable).
        unknown: refused. For torch's argument names the error gives the name used here.

    Under ``torch.autocast`` q, k and v are cast to its dtype, as by torch's own attention.

    A row without a visible key is zero, its lse is -inf and its gradients are zero. Memory beyond
    the outputs: a packed copy of keys and values, never S x T. The backward stores out and lse and
    recomputes the rest.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or an option is out of range.
    """
    try:
        if unknown:
            raise _unknown_argument(next(iter(unknown)))
        if is_any_autocast_on():
            q, k, v = autocast(q, k, v)
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
            name, t = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.dim() != 4)
            raise InputError(
                f"{name}: expected 4 dimensions (B, heads, length, D), got {tuple(t.shape)}"
            )
        batch, heads, queries, _ = q_shape
        kv_batch, kv_heads, keys, _ = k_shape
        v_batch, v_heads, v_keys, _ = v_shape
        if not (kv_batch == v_batch == batch and v_heads == kv_heads and v_keys == keys):
            raise InputError(
                f"k, v: expected (B, Hkv, T, D), (B, Hkv, T, Dv) with B = {batch} as q,"
                f" got {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if sinks is alibi_slopes is bias is window is softcap is None and dropout_p == 0:
            check_tensors(q, k, v, heads, kv_heads)
            scale = 1 / math.sqrt(q_shape[3]) if scale is None else float(scale)
            options = _new(AttentionOptions, (causal, scale, *_NO_OPTIONS))
            out, lse = _forward(q, k, v, None, None, None, None, options)
        else:
            bias = check_option_tensors(
                q, k, v, sinks, alibi_slopes, bias, kv_heads, (batch, heads, queries, keys)
            )
            options = check_options(q, causal, scale, window, softcap, dropout_p)
            seed = dropout_seed(dropout_p, q)
            out, lse = _forward(q, k, v, sinks, alibi_slopes, bias, seed, options)
        return (out, lse) if return_lse else out
    except TYPE_FAILURES as error:
        raise explain(error, attention, locals()) from None


# arguments of torch's F.scaled_dot_product_attention -> the equivalent here
_TORCH_ARGUMENTS = {
    "attn_mask": "bias (floats, or bool: True where a key is visible)",
    "is_causal": "causal (which aligns the last query with the last key)",
    "enable_gqa": "no such argument (always on)",
}


def _unknown_argument(name: str) -> InputError:
    keywords = ", ".join(attention.__kwdefaults__ or ())
    return InputError(
        f"{name}: expected {_TORCH_ARGUMENTS.get(name, f'one of {keywords}')}, got {name}"
    )


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
        raise InputError(f"q: expected a float dtype, got {q.dtype}")
    dtype, device = q.dtype, q.device
    if not (
        k.dtype == v.dtype == dtype
        and ((q.is_cpu and k.is_cpu and v.is_cpu) or k.device == v.device == device)
    ):
        for name, t in (("k", k), ("v", v)):
            if t.dtype != dtype and t.dtype not in kv_dtypes:
                raise InputError(f"{name}: expected {dtype} as q, got {t.dtype}")
            if t.device != device:
                raise InputError(f"{name}: expected device {device} as q, got {t.device}")
    width = q.shape[-1]
    if width == 0 or k.shape[-1] != width:
        raise InputError(f"k: expected head width D = {width} >= 1 as q, got k {tuple(k.shape)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise InputError(f"q: expected heads a multiple of k's {kv_heads}, got {heads}")


def check_option_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    kv_heads: int,
    bias_shape: tuple[int, ...],
    kv_dtypes: tuple[torch.dtype, ...] = (),
) -> Tensor | None:
    """Check the tensors that the three ops share, and return bias with four dimensions.

    `bias_shape` is (B, H, S, T).
    """
    heads, device = bias_shape[1], q.device
    check_tensors(q, k, v, heads, kv_heads, kv_dtypes)
    per_head = (
        () if sinks is alibi_slopes is None else (("sinks", sinks), ("alibi_slopes", alibi_slopes))
    )
    for name, t in per_head:
        if t is None:
            continue
        if t.shape != (heads,) or not t.is_floating_point() or t.device != device:
            raise InputError(
                f"{name}: expected ({heads},) floats on {device}, one a head,"
                f" got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise InputError(
            "alibi_slopes: expected constants (detach them), got a tensor that requires grad"
        )
    return None if bias is None else _bias_4d(q, bias, bias_shape)


def check_options(
    q: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout_p: float = 0.0,
) -> AttentionOptions:
    """Check the numbers that the three ops share."""
    if window is not None and window < 1:
        raise InputError(f"window: expected at least 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap: expected above 0 or None, got {softcap}")
    if not 0 <= dropout_p <= 1:
        raise InputError(f"dropout_p: expected 0 to 1, got {dropout_p}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return AttentionOptions(causal, scale, window or 0, softcap or 0.0, float(dropout_p))


def _bias_4d(q: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return bias with four dimensions, each 1 or the full size."""
    fits = bias.dim() <= 4 and all(
        n == 1 or n == full for n, full in zip(bias.shape[::-1], shape[::-1])
    )
    if not fits or bias.device != q.device:
        raise InputError(
            f"bias: expected to broadcast to {tuple(shape)} on {q.device},"
            f" got {tuple(bias.shape)} on {bias.device}"
        )
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -math.inf)
    if not bias.is_floating_point():
        raise InputError(f"bias: expected float or bool, got {bias.dtype}")
    return bias[(None,) * (4 - bias.dim())]


def dropout_seed(dropout_p: float, q: Tensor) -> Tensor | None:
    """Return (1,) int64 from torch's generator, or None without dropout."""
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def as_int32(t: Tensor) -> Tensor:
    """Convert offsets, lengths, pages or positions to the int32 that the kernels expect.

    A value beyond int32 becomes the nearest end of the range, which no tensor reaches: it is
    refused or left out, not wrapped.
    """
    return t if t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).int()


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(q, k, v, *_):
    (q,) = dense_rows(q)
    return empty_output(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


def backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    """Return gradients of the right shapes. `rest` ends with sinks, alibi_slopes, bias, seed,
    options, need_bias, in this order."""
    sinks, _, bias, _, *_, need_bias = rest
    return (
        *(t.new_empty(t.shape) for t in (q, k, v)),
        lse.new_empty(0 if sinks is None else sinks.shape[0]),
        lse.new_empty(bias.shape if bias is not None and need_bias else (0,)),
    )


def _backward_fake(dout, dlse, q, k, v, *rest):
    """Return gradients in the memory order of q, k and v, for the same reason as `empty_output`."""
    _, _, _, dsinks, dbias = backward_fake(dout, dlse, q, k, v, *rest)
    return *(torch.empty_like(t) for t in dense_rows(q, k, v)), dsinks, dbias


def _flops(q, k, v, *_, **__):
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


def _backward_flops(dout, dlse, q, k, v, *_, **__):
    """Count the products: of width D the recomputed scores, dq and dk; of width Dv the gradients of
    the probabilities and dv."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (3 * width + 2 * v[3])


_backward = declare(
    reference.attention_backward,
    "cpu triton",
    dispatch_arg="q",
    fake=_backward_fake,
    flops=_backward_flops,
)
_forward = declare(
    reference.attention_forward,
    "cpu triton",
    fake=_forward_fake,
    outputs="out lse",
    backward=_backward,
    gradients=("q", "k", "v", "sinks", "bias"),
    zeros_like={"dout": "out"},
    flops=_flops,
)
