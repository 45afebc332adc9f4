"""rope and paged_append of a decode step as one launch, by csrc/cuda/rope_append.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, stream
from fastlm.memory_order import dense_rows


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> Tensor:
    q, k, v = dense_rows(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel():
        extension().rope_append(
            q, k, v, cos, sin, out, k_cache, v_cache, block_table, positions, stream(q)
        )
    return out
