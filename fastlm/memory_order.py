"""Arrange the memory of the tensors that kernels read and write."""

import torch
from torch import Tensor


def dense(t: Tensor) -> Tensor:
    """Return t, copied unless the elements of each row are contiguous. Rows may have any stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def matrix(t: Tensor) -> Tensor:
    """Return t as a matrix (rows, width), `dense`."""
    return dense(t.reshape(-1, t.shape[-1]))


def rows_of(t: Tensor) -> Tensor:
    """Return t if it is contiguous, else its `matrix`: kernels that work by rows accept both."""
    return t if t.is_contiguous() else matrix(t)


def empty_rows(t: Tensor) -> Tensor:
    """Return an empty contiguous tensor of t's shape and dtype.

    This takes half as long as ``t.new_empty(t.shape)``, which passes the shape through Python.
    """
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def empty_output(q: Tensor, width: int) -> Tensor:
    """Return an empty tensor of q's shape with `width` elements per row, in q's memory order.

    Where q is the transpose of a projection's (B, S, H, D), so is the result, and the next
    projection reads it without a copy.
    """
    if width == q.shape[-1] and q.is_contiguous():
        return torch.empty_like(q)
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        batch, heads, rows, _ = q.shape
        return q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return q.new_empty(*q.shape[:-1], width)


def match_memory_order(q: Tensor, out: Tensor) -> Tensor:
    """Return out in the memory order that `empty_output` gives it."""
    (q,) = dense_rows(q)
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Return `dense` of each tensor."""
    return [*map(dense, tensors)]
