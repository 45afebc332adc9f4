"""What kernels that work by rows share: the rows of a tensor, and the tile of a program."""

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config


def matrix(t: Tensor) -> Tensor:
    """Reshape to (rows, width) with contiguous elements in a row; rows may have any stride."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def tile(rows: int, width: int, most: int, each: int) -> Config:
    """A tile of whole rows: one wide row or several narrow ones, no more than there are. A thread
    has `each` elements, twice as many where 16 warps are not enough."""
    block = triton.next_power_of_2(width)
    tile = max(1, min(most // block, triton.next_power_of_2(rows)))
    warps = max(1, min(16, tile * block // (32 * each)))
    return Config({"ROWS": tile, "BLOCK": block}, num_warps=warps)


@triton.jit
def load_sum(x, residual, at, residual_at, mask):
    """x + residual, rounded to x's dtype; x where residual is None."""
    h = tl.load(x + at, mask=mask, other=0.0)
    if residual is not None:
        r = tl.load(residual + residual_at, mask=mask, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
    return h
