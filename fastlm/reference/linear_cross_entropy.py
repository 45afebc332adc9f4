"""The definition of `linear_cross_entropy`."""

import torch
from torch import Tensor

from fastlm.reference.blocks import row_blocks
from fastlm.reference.cross_entropy import cross_entropy_rows, cross_entropy_rows_backward
from fastlm.reference.precision import widen
from fastlm.reference.target import check_target


def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run cross_entropy_forward on input (N, D) @ linear_weight (V, D)^T + linear_bias (V)."""
    check_target(target, linear_weight.shape[0], ignore_index)
    options = (class_weight, smooth, ignore_index, softcap, logit_scale)
    parts = [
        cross_entropy_rows(_logits(input[b], linear_weight, linear_bias), target[b], *options)
        for b in row_blocks(input.shape[0], linear_weight.shape[0])
    ]
    shift, log_sum, nll, smoothed = (torch.cat(part) for part in zip(*parts))
    return shift, log_sum, nll, smoothed


def linear_cross_entropy_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, linear_weight and linear_bias, empty where not needed."""
    x, w, none = widen(input), widen(linear_weight), input.new_empty(0)
    d_inputs, d_weight, d_bias = [], torch.zeros_like(w), w.new_zeros(w.shape[0])
    for b in row_blocks(input.shape[0], linear_weight.shape[0]):
        d_logits = cross_entropy_rows_backward(
            on_p[b],
            on_target[b],
            None if on_all is None else on_all[b],
            _logits(x[b], w, linear_bias),
            target[b],
            class_weight,
            shift[b],
            log_sum[b],
            ignore_index,
            softcap,
            logit_scale,
        )
        d_inputs.append(d_logits @ w)
        d_weight = d_weight + d_logits.t() @ x[b]
        d_bias = d_bias + d_logits.sum(0)
    return (
        torch.cat(d_inputs).to(input.dtype) if need_input else none,
        d_weight.to(linear_weight.dtype) if need_weight else none,
        none if linear_bias is None else d_bias.to(linear_bias.dtype),
    )


def linear_cross_entropy_loss(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    on_nll: Tensor,
    on_smoothed: Tensor | None,
    on_square: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of on_nll * nll + on_smoothed * smoothed + on_square * lse^2, and the
    gradients."""
    smooth, valid = on_smoothed is not None, target != ignore_index
    shift, log_sum, nll, smoothed = linear_cross_entropy_forward(
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        smooth,
        ignore_index,
        softcap,
        logit_scale,
    )
    lse = torch.where(valid, shift + log_sum, 0.0)
    loss, on_p = on_nll * nll, on_nll
    if on_smoothed is not None:
        loss = loss + on_smoothed * torch.where(valid, smoothed, 0.0)
        classes = linear_weight.shape[0]
        on_p = on_p + on_smoothed * (classes if class_weight is None else widen(class_weight).sum())
    if on_square is not None:
        loss = loss + on_square * lse.square()
        on_p = on_p + 2 * on_square * lse
    on_p = torch.where(valid, on_p, 0.0)
    gradients = linear_cross_entropy_backward(
        on_p,
        on_nll,
        None if on_smoothed is None else torch.where(valid, on_smoothed, 0.0),
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        shift,
        log_sum,
        ignore_index,
        softcap,
        logit_scale,
        need_input,
        need_weight,
    )
    return loss.sum(), gradients[0], widen(gradients[1]), widen(gradients[2])


def linear_cross_entropy_loss_backward(
    d_loss: Tensor,
    d_input: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients from linear_cross_entropy_loss times the gradient of its loss, in their
    tensors' dtypes.
    """
    return (
        (d_input * d_loss).to(d_input.dtype),
        (d_weight * d_loss).to(weight_dtype),
        (d_bias * d_loss).to(bias_dtype),
    )


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    bias = None if linear_bias is None else widen(linear_bias)
    return torch.nn.functional.linear(widen(input), widen(linear_weight), bias)
