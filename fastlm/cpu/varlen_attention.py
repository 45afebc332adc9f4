"""varlen_attention through csrc/cpu/attention: the host side of `attention`, with offsets."""

from fastlm.cpu.attention import backward_any_layout, forward_any_layout


def varlen_attention_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, bias, seed,
    max_seqlen_q, max_seqlen_k, options,
):  # fmt: skip
    layout = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None, None, None, None)
    return forward_any_layout(
        q, k, v, layout, sinks, alibi_slopes, bias, seed, options, (q.shape[1], q.shape[0]),
        cu_seqlens_q.shape[0] - 1, k.shape[0], 0,  # packed sequences never use the decode kernel
    )  # fmt: skip


def varlen_attention_backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, bias, seed,
    max_seqlen_q, max_seqlen_k, options, need_bias,
):  # fmt: skip
    cu_seqlens = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return backward_any_layout(
        dout, dlse, q, k, v, out, lse, cu_seqlens, sinks, alibi_slopes, bias, seed, options,
        need_bias, cu_seqlens_q.shape[0] - 1,
        *(int(cu.diff().max()) if cu.shape[0] > 1 else 0 for cu in cu_seqlens),
    )  # fmt: skip
