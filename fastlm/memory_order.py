"""The order in memory of tensors that kernels read, and of those that they write."""

import torch
from torch import Tensor


def dense(t: Tensor) -> Tensor:
    """t, copied unless the elements of a row are side by side; rows may have any stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def empty_out(q: Tensor, width: int) -> Tensor:
    """q's shape with `width` elements a row, in q's memory order: where q is a projection's
    (B, S, H, D) transposed, the result is one too, and goes into the next projection uncopied.
    """
    if width == q.shape[-1] and q.is_contiguous():
        return torch.empty_like(q)
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        batch, heads, rows, _ = q.shape
        return q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return q.new_empty(*q.shape[:-1], width)


def elements_last(*tensors: Tensor) -> list[Tensor]:
    """What `dense` returns for each, in one call."""
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]
