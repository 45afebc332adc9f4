"""The memory order of the tensors that kernels read and write."""

import torch
from torch import Tensor


def dense(t: Tensor) -> Tensor:
    """t, copied unless the elements of each row are contiguous; rows may have any stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def matrix(t: Tensor) -> Tensor:
    """t as a matrix (rows, width), `dense`."""
    return dense(t.reshape(-1, t.shape[-1]))


def rows_of(t: Tensor) -> Tensor:
    """t where it is contiguous, else `matrix`: what kernels that work by rows accept."""
    return t if t.is_contiguous() else matrix(t)


def empty_rows(t: Tensor) -> Tensor:
    """An empty contiguous tensor of t's shape and dtype; half as long as ``t.new_empty(t.shape)``,
    which passes the shape through Python."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def empty_out(q: Tensor, width: int) -> Tensor:
    """An empty tensor of q's shape with `width` elements per row, in q's memory order. Where q is
    the transpose of a projection's (B, S, H, D), so is the result, and the next projection reads it
    without a copy.
    """
    if width == q.shape[-1] and q.is_contiguous():
        return torch.empty_like(q)
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        batch, heads, rows, _ = q.shape
        return q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return q.new_empty(*q.shape[:-1], width)


def in_order_of(q: Tensor, out: Tensor) -> Tensor:
    """out in the memory order that `empty_out` gives it."""
    (q,) = elements_last(q)
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def elements_last(*tensors: Tensor) -> list[Tensor]:
    """`dense` of each tensor, in one call."""
    return [*map(dense, tensors)]
