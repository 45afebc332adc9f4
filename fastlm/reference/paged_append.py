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
    """Write ``cache[block_table[b, p // page_size], p % page_size] = x[b, s]``.

    Here p = positions[b, s]. An int8 cache receives ``round(x / scale)``, clamped to -127 to 127.
    A token without a slot in the cache is left out.
    """
    pages, page_size = k_cache.shape[:2]
    entry = positions.long() // page_size
    valid = (entry >= 0) & (entry < block_table.shape[1])
    b, s = valid.nonzero(as_tuple=True)
    page = block_table.long()[b, entry[b, s]]
    valid = (page >= 0) & (page < pages)
    b, s, page = b[valid], s[valid], page[valid]
    slot = positions.long()[b, s] % page_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = x[b, s]
        if scale is not None:
            rows = (widen(rows) / scale[:, None]).round().clamp(-127, 127)
        cache[page, slot] = rows.to(cache.dtype)
