"""Attention of dense tensors, with the kernels of attention_forward.py, attention_backward.py."""

import torch
from torch import Tensor

from fastlm.kernels.attention_backward import backward
from fastlm.kernels.attention_forward import SequenceLayout, forward, score_options
from fastlm.memory_order import dense_rows, empty_output
from fastlm.reference import AttentionOptions

_DIMS = (0, 1, 2)  # dimensions of sequence, head and row


def _layout(q: Tensor, k: Tensor) -> SequenceLayout:
    return SequenceLayout(q.shape[0], q.shape[2], k.shape[2])


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = dense_rows(q, k, v)
    out = empty_output(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o = score_options(alibi_slopes, seed, options)
    forward(q, k, v, out, lse, _DIMS, _DIMS, _layout(q, k), sinks, bias, o)
    return out, lse


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, alibi_slopes: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    options: AttentionOptions, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout, q, k, v, out = dense_rows(dout, q, k, v, out)
    gradients = tuple(torch.empty_like(t) for t in (q, k, v))
    o = score_options(alibi_slopes, seed, options)
    layout = _layout(q, k)
    rest = backward(
        dout, dlse, q, k, v, out, lse, *gradients, _DIMS, layout, sinks, bias, o, need_bias
    )
    return *gradients, *rest
