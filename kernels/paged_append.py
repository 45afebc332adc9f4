"""paged_append by torch, without reading values back: one kernel of Triton would not be faster than
its gather, and the CUDA kernel is chosen where it is built.
"""

import torch
from torch import Tensor


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
    """The reference without reading values back. A token that is left out writes the same as one
    that is not or, if all are left out, what the cache already has.
    """
    pages, page_size = k_cache.shape[:2]
    if not pages * block_table.shape[1] * positions.numel():
        return
    positions = positions.long()
    entry = positions.div(page_size, rounding_mode="floor")
    page = block_table.long().gather(1, entry.clamp(0, block_table.shape[1] - 1))
    there = (entry >= 0) & (entry < block_table.shape[1]) & (page >= 0) & (page < pages)
    there = there.flatten()
    token = torch.arange(there.numel(), device=there.device)
    token = token.where(there, there.int().argmax())
    at = page.flatten()[token].clamp(0, pages - 1), (positions % page_size).flatten()[token]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = x.flatten(0, 1)[token]
        if scale is not None:
            rows = (rows.float() / scale[:, None]).round().clamp(-127, 127)
        cache[at] = rows.to(cache.dtype).where(there.any(), cache[at])
