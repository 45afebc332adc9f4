"""Attention on a paged cache: the kernel of attention_forward.py looks up each key's page.

The lengths stay on the device. The number of programs that share a sequence's keys follows from the
capacity of the table; the programs divide the keys that exist. The CPU refuses lengths and pages
out of bounds. Here they are clamped to the table and the cache.
"""

import torch
from torch import Tensor

from fastlm.kernels.attention_forward import PagedCache, SequenceLayout, forward, score_options
from fastlm.memory_order import dense_rows
from fastlm.reference import AttentionOptions

_DIMS = (0, 2, 1)  # dimensions of sequence (or page), head and row


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, sinks: Tensor | None,
    alibi_slopes: Tensor | None, bias: Tensor | None, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k_cache, v_cache = dense_rows(q, k_cache, v_cache)
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, v_cache.shape[3])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    count, page_size = k_cache.shape[:2]
    pages = PagedCache(table, seq_lens.contiguous(), k_scale, v_scale, table.stride(0), count)
    max_keys = table.shape[1] * page_size if count else 0  # without pages there is none to clamp to
    layout = SequenceLayout(batch, queries, max_keys, pages=pages, page_size=page_size)
    o = score_options(alibi_slopes, None, options)
    forward(q, k_cache, v_cache, out, lse, _DIMS, _DIMS, layout, sinks, bias, o)
    return out, lse
