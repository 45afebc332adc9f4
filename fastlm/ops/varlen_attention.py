"""Attention over sequences packed one after the other, with no padding and no leak between them."""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import Kernel
from fastlm.cpu import varlen_attention as cpu
from fastlm.errors import InputError
from fastlm.flops import has_values
from fastlm.operator import autocast, autocast_somewhere, register
from fastlm.ops.attention import (
    NUMBERS,
    as_int32,
    backward_fake,
    check_options,
    dropout_seed,
    wide_dtype,
)
from fastlm.ops.wrong_type import FAILURES, explained


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each sequence b on its rows ``cu_seqlens[b]:cu_seqlens[b + 1]``; same options.

    Args:
        q: (total_q, H, D), k: (total_k, Hkv, D), v: (total_k, Hkv, Dv). Any strides.
        cu_seqlens_q: (B + 1,), int32 or int64, non-decreasing from 0 to total_q; a sequence may be
            empty.
        cu_seqlens_k: the same for the keys; cu_seqlens_q by default.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences, a hint for GPU launches; the
            totals by default.
        bias: broadcast to (B, H, longest S, longest T); a shorter sequence uses the first rows and
            keys of it.
        return_lse: also return lse (H, total_q), float32.

    Raises:
        InputError: as `attention`; on the CPU, when the offsets do not rise from 0 to the total
            (this check would wait for a GPU, whose kernels stay inside the tensors).
    """
    try:
        if autocast_somewhere():
            q, k, v = autocast(q, k, v)
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() != 3:
                raise InputError(
                    f"{name}: wanted 3 dimensions (total, heads, D), got {tuple(t.shape)}"
                )
        if v.shape[:2] != k.shape[:2]:
            raise InputError(
                f"v: wanted (total_k, Hkv, Dv) as k {tuple(k.shape)}, got {tuple(v.shape)}"
            )
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if t.dim() != 1 or t.dtype not in (torch.int32, torch.int64) or t.device != q.device:
                raise InputError(
                    f"{name}: wanted (B + 1,) int32 on {q.device},"
                    f" got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
        if cu_seqlens_k.shape != cu_seqlens_q.shape or cu_seqlens_q.shape[0] == 0:
            raise InputError(
                f"cu_seqlens_k: wanted (B + 1,) as cu_seqlens_q {tuple(cu_seqlens_q.shape)},"
                f" got {tuple(cu_seqlens_k.shape)}"
            )
        batch = cu_seqlens_q.shape[0] - 1
        if bias is None:
            bias_shape = (batch, q.shape[1], 1, 1)
        else:  # its last two sizes are checked where the offsets are read
            bias_shape = (batch, q.shape[1], *(1, 1, *bias.shape)[-2:])
        options = check_options(
            q, k, v, q.shape[1], k.shape[1], causal, scale, window, softcap, sinks, alibi_slopes,
            bias, bias_shape,
        )  # fmt: skip
        seed = dropout_seed(dropout_p, q)
        out, lse = _forward(
            q, k, v, as_int32(cu_seqlens_q), as_int32(cu_seqlens_k), *options[:3], seed,
            q.shape[0] if max_seqlen_q is None else max_seqlen_q,
            k.shape[0] if max_seqlen_k is None else max_seqlen_k,
            *options[3:], float(dropout_p),
        )  # fmt: skip
        return (out, lse) if return_lse else out
    except FAILURES as error:
        raise explained(error, varlen_attention, locals()) from None


def _forward_fake(q, k, v, *_):
    return (
        q.new_empty(*q.shape[:2], v.shape[2]),
        q.new_empty((q.shape[1], q.shape[0]), dtype=wide_dtype(q)),
    )


def _backward_fake(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *rest):
    return backward_fake(dout, dlse, q, k, v, out, lse, *rest)


def _setup_context(ctx, inputs, output):
    *tensors, sinks, alibi_slopes, bias, seed = inputs[:9]
    ctx.numbers = inputs[9:]
    ctx.save_for_backward(*tensors, *output, sinks, alibi_slopes, bias, seed)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout, dlse):
    q, k, v, cu_q, cu_k, out, lse, sinks, alibi_slopes, bias, seed = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = _backward(
        dout, dlse, q, k, v, out, lse, cu_q, cu_k, sinks, alibi_slopes, bias, seed, *ctx.numbers,
        ctx.needs_input_grad[7],
    )  # fmt: skip
    dq, dk, dv, dsinks, dbias = grads
    return (
        dq,
        dk,
        dv,
        None,
        None,
        None if sinks is None else dsinks.to(sinks.dtype),
        None,
        dbias.to(bias.dtype) if ctx.needs_input_grad[7] else None,
        *(None,) * (1 + len(ctx.numbers)),
    )


def _pairs(cu_q, cu_k, sinks, alibi_slopes, bias, seed, longest_q, longest_k, *_):
    """Queries times keys, summed over all sequences; with the longest lengths if the lengths cannot
    be read.
    """
    if not has_values(cu_q):
        return (cu_q.shape[0] - 1) * longest_q * longest_k
    return int((cu_q.diff().long() * cu_k.diff()).sum())


def _flops(q, k, v, *layout, **_):
    return 2 * q.shape[1] * _pairs(*layout) * (q.shape[2] + v.shape[2])


def _backward_flops(dout, dlse, q, k, v, out, lse, *layout, **_):
    return 2 * q.shape[1] * _pairs(*layout) * (3 * q.shape[2] + 2 * v.shape[2])


_NUMBERS = f"SymInt max_seqlen_q, SymInt max_seqlen_k, {NUMBERS}"
_forward = register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? seed,"
    f" {_NUMBERS}, float dropout_p) -> (Tensor, Tensor)",
    fake=_forward_fake,
    implementations={
        "reference": reference.varlen_attention_forward,
        "cpu": cpu.forward,
        "triton": Kernel("varlen_attention", "varlen_attention_forward"),
    },
    setup_context=_setup_context,
    backward=_autograd_backward,
    flops_by_values=_flops,
)
_backward = register(
    "varlen_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sinks, Tensor? alibi_slopes,"
    f" Tensor? bias, Tensor? seed, {_NUMBERS}, float dropout_p, bool bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": reference.varlen_attention_backward,
        "cpu": cpu.backward,
        "triton": Kernel("varlen_attention", "varlen_attention_backward"),
    },
    picked_by=2,
    flops_by_values=_backward_flops,
)
