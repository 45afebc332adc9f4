"""The definition of `paged_attention`."""

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.reference.attention import AttentionOptions, attend
from fastlm.reference.precision import widen
from fastlm.reference.sequence_bias import sequence_bias


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Run `attention` of each sequence on its pages: q (B, S, H, D) -> out (B, S, H, Dv),
    lse (B, H, S).
    """
    pages, page_size = k_cache.shape[:2]
    outs = [q.new_zeros(0, *q.shape[1:3], v_cache.shape[3])]
    lses = [widen(q[:0, :, :, 0]).mT]

    def gather(cache: Tensor, table: Tensor, keys: int, scales: Tensor | None) -> Tensor:
        rows = cache[table].flatten(0, 1)[:keys].transpose(0, 1)[None].to(widen(q[:0]).dtype)
        return rows if scales is None else rows * scales.to(rows.dtype)[:, None, None]

    for b, keys in enumerate(seq_lens.tolist()):
        if not 0 <= keys <= block_table.shape[1] * page_size:
            raise InputError(
                f"seq_lens: expected 0 to {block_table.shape[1] * page_size}"
                f" (pages a sequence x page size), got {keys} for sequence {b}"
            )
        table = block_table[b, : (keys + page_size - 1) // page_size].long()
        if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < pages:
            raise InputError(
                f"block_table: expected pages 0 to {pages - 1},"
                f" got {int(table.min())} to {int(table.max())} for sequence {b}"
            )
        o, one_lse = attend(
            widen(q[b : b + 1].transpose(1, 2)),
            gather(k_cache, table, keys, k_scale),
            gather(v_cache, table, keys, v_scale),
            sinks,
            alibi_slopes,
            sequence_bias(bias, b, q.shape[1], keys),
            None,
            options,
        )
        outs.append(o.transpose(1, 2).to(q.dtype))
        lses.append(one_lse)
    return torch.cat(outs), torch.cat(lses)
