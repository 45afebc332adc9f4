"""paged_attention by csrc/cpu/attention: the host side of `attention`, with pages."""

from fastlm.cpu.attention import run_forward
from fastlm.cpu.templates import empty_float32
from fastlm.memory_order import dense_rows


def paged_attention(
    q, k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, sinks, alibi_slopes, bias, options
):
    q, k_cache, v_cache = dense_rows(q, k_cache, v_cache)
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, v_cache.shape[3])
    lse = empty_float32().new_empty(batch, heads, queries)
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    layout = (None, None, table, seq_lens.contiguous(), k_scale, v_scale)
    return run_forward(
        q, k_cache, v_cache, layout, sinks, alibi_slopes, bias, None, options, out, lse
    )
