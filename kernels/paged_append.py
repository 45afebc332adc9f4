"""paged_append by torch, without reading values back to the host.

A Triton kernel would not be faster than torch's gather, and where the CUDA kernel is built, that
one runs.
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
    """Append without reading values back.

    A token that is left out writes the same value as one that is not. If all tokens are left out,
    they write what the cache already has.
    """
    pages, page_size = k_cache.shape[:2]
    if not pages * block_table.shape[1] * positions.numel():
        return
    positions = positions.long()
    entry = positions.div(page_size, rounding_mode="floor")
    page = block_table.long().gather(1, entry.clamp(0, block_table.shape[1] - 1))
    valid = (entry >= 0) & (entry < block_table.shape[1]) & (page >= 0) & (page < pages)
    valid = valid.flatten()
    token = torch.arange(valid.numel(), device=valid.device)
    token = token.where(valid, valid.int().argmax())
    at = page.flatten()[token].clamp(0, pages - 1), (positions % page_size).flatten()[token]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = x.flatten(0, 1)[token]
        if scale is not None:
            rows = (rows.float() / scale[:, None]).round().clamp(-127, 127)
        cache[at] = rows.to(cache.dtype).where(valid.any(), cache[at])
