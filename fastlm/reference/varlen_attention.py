"""The definition of `varlen_attention`."""

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.reference.attention import AttentionOptions, attend, attend_backward
from fastlm.reference.precision import widen
from fastlm.reference.sequence_bias import sequence_bias


def _offsets(cu_seqlens: Tensor, total: int, name: str) -> list[int]:
    offsets = cu_seqlens.tolist()
    rising = offsets == sorted(offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != total or not rising:
        raise InputError(f"{name}: expected offsets that rise from 0 to {total}, got {offsets[:8]}")
    return offsets


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Run `attention` of each sequence: q (total_q, H, D) -> out (total_q, H, Dv),
    lse (H, total_q).
    """
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [widen(q[:0, :, 0]).mT]
    ends_q = _offsets(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    ends_k = _offsets(cu_seqlens_k, k.shape[0], "cu_seqlens_k")
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        o, one_lse = attend(
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            sinks,
            alibi_slopes,
            sequence_bias(bias, b, q1 - q0, k1 - k0),
            seed,
            options,
            first_batch=b,
        )
        outs.append(o[0].transpose(0, 1))
        lses.append(one_lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward of `attention` for each sequence."""
    grads = [[t.new_zeros(0, *t.shape[1:])] for t in (q, k, v)]
    dsinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    dbias = lse.new_zeros(bias.shape if bias is not None and need_bias else 0)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        *sequence_grads, sequence_dsinks, sequence_dbias = attend_backward(
            dout[q0:q1].transpose(0, 1)[None],
            None if dlse is None else dlse[None, :, q0:q1],
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            out[q0:q1].transpose(0, 1)[None],
            lse[None, :, q0:q1],
            sinks,
            alibi_slopes,
            sequence_bias(bias, b, q1 - q0, k1 - k0),
            seed,
            options,
            need_bias,
            first_batch=b,
        )
        for parts, grad in zip(grads, sequence_grads):
            parts.append(grad[0].transpose(0, 1))
        dsinks = dsinks + sequence_dsinks
        if bias is not None and need_bias:
            before = b if bias.shape[0] > 1 else 0
            after = [n - m for n, m in zip(bias.shape, sequence_dbias.shape)]
            padding = (0, after[3], 0, after[2], 0, 0, before, after[0] - before)
            dbias = dbias + torch.nn.functional.pad(sequence_dbias, padding)
    dq, dk, dv = (torch.cat(parts) for parts in grads)
    return dq, dk, dv, dsinks, dbias
