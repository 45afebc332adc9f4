"""New keys and values into an int8 cache of pages, by csrc/cuda/paged_append.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, stream
from fastlm.ops.attention import elements_last


def paged_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """``cache[block_table[b, p // page_size], p % page_size] = round(x / scale)``, in place.

    Values are rounded to even and held within -127 to 127. They are what
    `fastlm.ops.paged_attention` reads with the same scales.

    Args:
        k: (B, S, Hkv, D), v: (B, S, Hkv, Dv): float32, bfloat16 or float16.
        k_cache: (pages, page_size, Hkv, D), v_cache: (pages, page_size, Hkv, Dv), int8; elements
            of a head side by side.
        block_table: (B, max_pages) int32.
        positions: (B, S) int32: p of each token. One below 0 or beyond the table, or whose page is
            not in the cache, is left out (rows of a padded batch). No two tokens at one place.
        k_scale, v_scale: (Hkv,) float32.

    Raises:
        ValueError: a dtype, or a shape that does not fit.
    """
    k, v = elements_last(k, v)
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    with torch.cuda.device_of(k):  # kernels start on the current device
        extension().paged_append(
            k, v, k_cache, v_cache, table, positions.contiguous(), k_scale, v_scale, stream(k)
        )
