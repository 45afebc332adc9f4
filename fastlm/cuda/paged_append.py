"""paged_append through csrc/cuda/paged_append.cu."""

from fastlm.cuda import extension, stream
from fastlm.memory_order import elements_last


def paged_append(k, v, k_cache, v_cache, block_table, positions, k_scale, v_scale) -> None:
    k, v = elements_last(k, v)
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    extension().paged_append(
        k, v, k_cache, v_cache, table, positions.contiguous(), k_scale, v_scale, stream(k)
    )
