"""The definition of `linear`."""

import math

from torch import Tensor

from fastlm.reference.precision import widen


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y = x weight^T + bias: (..., K), (N, K), (N,) -> (..., N)."""
    y = widen(x) @ widen(weight).mT
    return (y if bias is None else y + widen(bias)).to(x.dtype)


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx = dy weight, dweight = dy^T x and dbias = sum of dy.

    dx is empty without weight, dweight without x, dbias where it is not needed.
    """
    n, g = dy.shape[-1], widen(dy)
    rows = g.reshape(math.prod(dy.shape[:-1]), n)
    dx, dweight, dbias = (g.new_empty(0) for _ in range(3))
    if weight is not None:
        dx = g @ widen(weight)
    if x is not None:
        dweight = rows.mT @ widen(x).reshape(len(rows), x.shape[-1])
    if need_bias:
        dbias = rows.sum(0)
    return dx.to(dy.dtype), dweight.to(dy.dtype), dbias.to(dy.dtype)
