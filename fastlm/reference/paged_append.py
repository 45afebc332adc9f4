"""The definition of `paged_append`."""

from torch import Tensor

from fastlm.reference.precision import widen


def paged_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """``cache[block_table[b, p // page_size], p % page_size] = x[b, s]`` with p = positions[b, s];
    in int8 caches ``round(x / scale)``, clamped to -127 to 127. A token whose place does not exist
    is left out.
    """
    pages, page_size = k_cache.shape[:2]
    entry = positions.long() // page_size
    there = (entry >= 0) & (entry < block_table.shape[1])
    b, s = there.nonzero(as_tuple=True)
    page = block_table.long()[b, entry[b, s]]
    there = (page >= 0) & (page < pages)
    b, s, page = b[there], s[there], page[there]
    slot = positions.long()[b, s] % page_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = x[b, s]
        if scale is not None:
            rows = (widen(rows) / scale[:, None]).round().clamp(-127, 127)
        cache[page, slot] = rows.to(cache.dtype)
