"""Attention over packed sequences, without padding and without attention across sequences."""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.flops import has_values
from fastlm.operator import autocast, declare, is_any_autocast_on
from fastlm.ops.attention import (
    as_int32,
    backward_fake,
    check_option_tensors,
    check_options,
    dropout_seed,
    wide_dtype,
)
from fastlm.ops.wrong_type import TYPE_FAILURES, explain


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
        if is_any_autocast_on():
            q, k, v = autocast(q, k, v)
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() != 3:
                raise InputError(
                    f"{name}: expected 3 dimensions (total, heads, D), got {tuple(t.shape)}"
                )
        if v.shape[:2] != k.shape[:2]:
            raise InputError(
                f"v: expected (total_k, Hkv, Dv) as k {tuple(k.shape)}, got {tuple(v.shape)}"
            )
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if t.dim() != 1 or t.dtype not in (torch.int32, torch.int64) or t.device != q.device:
                raise InputError(
                    f"{name}: expected (B + 1,) int32 on {q.device},"
                    f" got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
        if cu_seqlens_k.shape != cu_seqlens_q.shape or cu_seqlens_q.shape[0] == 0:
            raise InputError(
                f"cu_seqlens_k: expected (B + 1,) as cu_seqlens_q {tuple(cu_seqlens_q.shape)},"
                f" got {tuple(cu_seqlens_k.shape)}"
            )
        batch = cu_seqlens_q.shape[0] - 1
        if bias is None:
            bias_shape = (batch, q.shape[1], 1, 1)
        else:  # its last two sizes are checked where the offsets are read
            bias_shape = (batch, q.shape[1], *(1, 1, *bias.shape)[-2:])
        bias = check_option_tensors(q, k, v, sinks, alibi_slopes, bias, k.shape[1], bias_shape)
        options = check_options(q, causal, scale, window, softcap, dropout_p)
        seed = dropout_seed(dropout_p, q)
        out, lse = _forward(
            q, k, v, as_int32(cu_seqlens_q), as_int32(cu_seqlens_k), sinks, alibi_slopes, bias,
            seed, q.shape[0] if max_seqlen_q is None else max_seqlen_q,
            k.shape[0] if max_seqlen_k is None else max_seqlen_k, options,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    except TYPE_FAILURES as error:
        raise explain(error, varlen_attention, locals()) from None


def _forward_fake(q, k, v, *_):
    return (
        q.new_empty(*q.shape[:2], v.shape[2]),
        q.new_empty((q.shape[1], q.shape[0]), dtype=wide_dtype(q)),
    )


def _backward_fake(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *rest):
    return backward_fake(dout, dlse, q, k, v, out, lse, *rest)


def _score_count(cu_q, cu_k, sinks, alibi_slopes, bias, seed, max_seqlen_q, max_seqlen_k, *_):
    """Return queries times keys, summed over all sequences. If the lengths cannot be read, all
    sequences count as the longest."""
    if not has_values(cu_q):
        return (cu_q.shape[0] - 1) * max_seqlen_q * max_seqlen_k
    return int((cu_q.diff().long() * cu_k.diff()).sum())


def _flops(q, k, v, *layout, **_):
    return 2 * q.shape[1] * _score_count(*layout) * (q.shape[2] + v.shape[2])


def _backward_flops(dout, dlse, q, k, v, out, lse, *layout, **_):
    return 2 * q.shape[1] * _score_count(*layout) * (3 * q.shape[2] + 2 * v.shape[2])


_backward = declare(
    reference.varlen_attention_backward,
    "cpu triton",
    dispatch_arg="q",
    fake=_backward_fake,
    flops_by_values=_backward_flops,
)
_forward = declare(
    reference.varlen_attention_forward,
    "cpu triton",
    fake=_forward_fake,
    outputs="out lse",
    backward=_backward,
    gradients=("q", "k", "v", "sinks", "bias"),
    zeros_like={"dout": "out"},
    flops_by_values=_flops,
)
