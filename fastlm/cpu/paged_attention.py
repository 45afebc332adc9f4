"""paged_attention through csrc/cpu/attention. Calls the host side of `attention` with the pages
and the number of keys for which its workspace must have room.
"""

from fastlm.cpu.attention import forward_any_layout

# Above this number of keys that fit in the table, the workspace is sized by the lengths (4 us
# more): a server's tables have room for the longest context in every row.
_ROOM = 1 << 15


def paged_attention(
    q,
    k_cache,
    v_cache,
    block_table,
    seq_lens,
    k_scale,
    v_scale,
    sinks,
    alibi_slopes,
    bias,
    options,
):
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    layout = (None, None, table, seq_lens.contiguous(), k_scale, v_scale)
    b, s, h, _ = q.shape
    longest = table.shape[1] * k_cache.shape[1]
    rows = b * longest
    if rows > _ROOM:
        rows = min(rows, max(0, int(seq_lens.sum())))
        longest = min(longest, max(0, int(seq_lens.max())))
    return forward_any_layout(
        q, k_cache, v_cache, layout, sinks, alibi_slopes, bias, None, options, (b, h, s), b,
        rows, longest,
    )  # fmt: skip
