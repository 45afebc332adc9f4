"""Shared by kernels that work by rows: reshape to rows, choose a tile, add a residual."""

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config


def matrix(t: Tensor) -> Tensor:
    """Reshape to (rows, width) with contiguous elements in a row; rows may have any stride."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def tile(rows: int, width: int, max_elements: int, per_thread: int) -> Config:
    """Return the config of a tile of one wide row or several narrow ones, no more than there are.

    A thread has `per_thread` elements, twice as many where 16 warps are not enough.
    """
    block = triton.next_power_of_2(width)
    tile = max(1, min(max_elements // block, triton.next_power_of_2(rows)))
    warps = max(1, min(16, tile * block // (32 * per_thread)))
    return Config({"ROWS": tile, "BLOCK": block}, num_warps=warps)


@triton.jit
def load_sum(x, residual, at, residual_at, mask):
    """Load x + residual, rounded to x's dtype, or x where residual is None."""
    h = tl.load(x + at, mask=mask, other=0.0)
    if residual is not None:
        r = tl.load(residual + residual_at, mask=mask, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
    return h
