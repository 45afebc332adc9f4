"""varlen_attention by csrc/cpu/attention: the host side of `attention`, with offsets."""

from fastlm.cpu.attention import run_backward, run_forward
from fastlm.cpu.templates import empty_float32
from fastlm.memory_order import dense_rows


def varlen_attention_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, bias, seed,
    max_seqlen_q, max_seqlen_k, options,
):  # fmt: skip
    q, k, v = dense_rows(q, k, v)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = empty_float32().new_empty(q.shape[1], q.shape[0])
    layout = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None, None, None, None)
    return run_forward(q, k, v, layout, sinks, alibi_slopes, bias, seed, options, out, lse)


def varlen_attention_backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, bias, seed,
    max_seqlen_q, max_seqlen_k, options, need_bias,
):  # fmt: skip
    dout, q, k, v, out = dense_rows(dout, q, k, v, out)
    layout = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None, None, None, None)
    return run_backward(
        dout, dlse, q, k, v, out, lse, layout, sinks, alibi_slopes, bias, seed, options, need_bias,
        *(t.new_empty(t.shape) for t in (q, k, v)),
    )  # fmt: skip
