"""Attention of packed sequences, with the kernels of attention_forward.py, attention_backward.py.

A program finds its sequence in cu_seqlens on the device. max_seqlen_q only selects tile sizes: a
wrong value costs time, not rows.

The CPU refuses wrong offsets. Here that would wait for the device, so they are clamped to the
tensors. Rows that belong to no sequence are left as they were.
"""

import torch
from torch import Tensor

from fastlm.kernels.attention_backward import backward
from fastlm.kernels.attention_forward import CuSeqlens, SequenceLayout, forward, score_options
from fastlm.memory_order import dense_rows
from fastlm.reference import AttentionOptions

_DIMS = (None, 1, 0)  # dimensions of sequence, head and row


def _layout(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen_q: int) -> SequenceLayout:
    cu_seqlens = CuSeqlens(cu_q.contiguous(), cu_k.contiguous())
    return SequenceLayout(cu_q.shape[0] - 1, q.shape[0], k.shape[0], cu_seqlens, max_seqlen_q)


def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    sinks: Tensor | None, alibi_slopes: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = dense_rows(q, k, v)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    o = score_options(alibi_slopes, seed, options)
    layout = _layout(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    forward(q, k, v, out, lse, _DIMS, _DIMS, layout, sinks, bias, o)
    return out, lse


def varlen_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    options: AttentionOptions, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout, q, k, v, out = dense_rows(dout, q, k, v, out)
    gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
    o = score_options(alibi_slopes, seed, options)
    layout = _layout(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    rest = backward(
        dout, dlse, q, k, v, out, lse, *gradients, _DIMS, layout, sinks, bias, o, need_bias
    )
    return *gradients, *rest
