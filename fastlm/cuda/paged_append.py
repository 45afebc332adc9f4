"""paged_append by csrc/cuda/paged_append.cu."""

from torch import Tensor

from fastlm.cuda import extension, stream
from fastlm.memory_order import dense_rows


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
    k, v = dense_rows(k, v)
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    extension().paged_append(
        k, v, k_cache, v_cache, table, positions.contiguous(), k_scale, v_scale, stream(k)
    )
