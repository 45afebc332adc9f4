"""Compute losses per row from the outputs of the cross-entropy kernels (nll, smoothed, lse).

Class weights, smoothing, z-loss, reduction and ignored rows are factors, applied in plain torch:

    loss = on_nll * nll + on_smoothed * smoothed + on_square * lse^2
"""

import torch
from torch import Tensor


def row_factors(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    classes: int,
    reduction: str,
    num_items: int | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the factors (N) of nll, smoothed and lse^2: on_nll, on_smoothed and on_square.

    The sum of the three products is each row's loss, reduction included.
    """
    valid = target != ignore_index
    class_factor = row_factor = valid.to(dtype)
    if weight is not None:
        # clamp: a target out of range is refused by the kernel, not by this look-up
        target_weight = weight.detach().to(dtype)[target.clamp(0, classes - 1)]
        class_factor = torch.where(valid, target_weight, 0.0)
    if reduction == "mean":
        scale = 1.0 / (class_factor.sum() if num_items is None else as_scalar(num_items))
        class_factor, row_factor = class_factor * scale, row_factor * scale
    on_nll = class_factor * (1.0 - label_smoothing)
    on_smoothed = row_factor * (label_smoothing / classes) if label_smoothing else None
    return on_nll, on_smoothed, row_factor * z_loss if z_loss else None


def row_losses(
    on_nll: Tensor,
    on_smoothed: Tensor | None,
    on_square: Tensor | None,
    nll: Tensor,
    smoothed: Tensor,
    lse: Tensor,
    valid: Tensor,
) -> Tensor:
    """Return the losses (N) of the rows.

    `where`, rather than a factor of 0, keeps an infinite lse of an ignored row out of loss and
    gradient.
    """
    loss = on_nll * nll
    if on_smoothed is not None:
        loss = loss + on_smoothed * torch.where(valid, smoothed, 0.0)
    if on_square is not None:
        loss = loss + on_square * torch.where(valid, lse, 0.0).square()
    return loss


def as_scalar(num_items: int | Tensor) -> int | Tensor:
    """Return num_items without the dimension that a shape of (1,) would add to a scalar loss."""
    return num_items.reshape(()) if isinstance(num_items, Tensor) else num_items
