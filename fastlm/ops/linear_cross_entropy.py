"""Cross-entropy of a linear layer's outputs, without the (N, V) logits ever being in memory.

Two ways, one kernel pair (csrc/cpu/linear_cross_entropy.h):

- "sum" and "mean": the gradient of each row is known in the forward up to one factor, so it is computed there, chunk
  of rows by chunk of rows, while the chunk's exponentials are at hand: 3 matrix products (`linear_cross_entropy_loss`);
- "none", or with lse: the gradient of each row is known in the backward only: lse in the forward, the logits again in
  the backward: 4 matrix products (`linear_cross_entropy`, `linear_cross_entropy_backward`).
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import register
from fastlm.errors import InputError
from fastlm.ops.cross_entropy import (
    check,
    check_options,
    coefficients,
    row_factors,
    row_losses,
    wide,
)

# The first way holds the weight's gradient in float32 until the backward. For a weight of fewer bits that is memory
# over the gradient itself: above this many elements (64 MiB) the second way, which needs none, is taken.
_FLOAT32_GRADIENT = 16 << 20


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(F.linear(input, linear_weight, linear_bias).float(), target, ...)``.

    Args:
        input: (..., D), float32, bfloat16 or float16 (float64 on the reference).
        linear_weight: (V, D), input's dtype.
        target: (...), int64 or int32.
        linear_bias: (V,), any float dtype.
        others: as in `cross_entropy`.

    Logits, sums and lse are float32; the gradient of the logits is rounded to input's dtype for the matrix products
    that follow it, which sum in float32. Memory beside the gradients: at most 64 MiB.

    Raises:
        InputError: shapes, dtypes or options that do not fit; on the CPU also a target out of range.
    """
    if linear_weight.dim() != 2 or input.dim() == 0 or linear_weight.shape[1] != input.shape[-1]:
        raise InputError(
            f"linear_weight: wanted shape (V, D), D the last dimension of input {tuple(input.shape)},"
            f" got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dtype != input.dtype or linear_weight.device != input.device:
        raise InputError(
            f"linear_weight: wanted {input.dtype} on {input.device} as input,"
            f" got {linear_weight.dtype} on {linear_weight.device}"
        )
    classes = linear_weight.shape[0]
    if linear_bias is not None and linear_bias.shape != (classes,):
        raise InputError(f"linear_bias: wanted shape ({classes},), got {tuple(linear_bias.shape)}")
    check(input, "input", classes, target, weight, label_smoothing)
    check_options(softcap, reduction, num_items)
    rows, flat = target.reshape(-1).long(), input.reshape(-1, input.shape[-1])
    factors = row_factors(
        rows,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        classes,
        reduction,
        num_items,
        wide(input),
    )
    options = (ignore_index, softcap, logit_scale)
    smoothing_weight = weight if label_smoothing else None
    need_input, need_weight, need_bias = (
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (input, linear_weight, linear_bias)
    )
    if (
        (need_input or need_weight or need_bias)
        and reduction != "none"
        and not return_lse
        and not (softcap is not None and label_smoothing)
        and (input.dtype.itemsize >= 4 or linear_weight.numel() <= _FLOAT32_GRADIENT)
    ):
        return _loss(
            flat,
            linear_weight,
            linear_bias,
            rows,
            smoothing_weight,
            *factors,
            *options,
            need_input,
            need_weight,
        )[0]
    shift, log_sum, nll, smoothed = _forward(
        flat, linear_weight, linear_bias, rows, smoothing_weight, label_smoothing > 0, *options
    )
    lse = shift + log_sum
    loss = row_losses(*factors, nll, smoothed, lse, rows != ignore_index)
    loss = loss.view(target.shape) if reduction == "none" else loss.sum()
    return (loss, lse.view(target.shape)) if return_lse else loss


def _forward_fake(
    input,
    linear_weight,
    linear_bias,
    target,
    class_weight,
    smooth,
    ignore_index,
    softcap,
    logit_scale,
):
    per_row = [input.new_empty(target.shape, dtype=wide(input)) for _ in range(3)]
    return *per_row, input.new_empty(target.shape if smooth else 0, dtype=wide(input))


def _gradients_fake(input, linear_weight, linear_bias, need_input, need_weight):
    return (
        input.new_empty(input.shape if need_input else 0),
        linear_weight.new_empty(linear_weight.shape if need_weight else 0),
        input.new_empty(0) if linear_bias is None else linear_bias.new_empty(linear_bias.shape),
    )


def _backward_fake(
    on_p,
    on_target,
    on_all,
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
):
    return _gradients_fake(input, linear_weight, linear_bias, need_input, need_weight)


def _loss_fake(
    input,
    linear_weight,
    linear_bias,
    target,
    class_weight,
    on_nll,
    on_smoothed,
    on_square,
    ignore_index,
    softcap,
    logit_scale,
    need_input,
    need_weight,
):
    loss = input.new_empty((), dtype=wide(input))
    return loss, *_gradients_fake(input, linear_weight, linear_bias, need_input, need_weight)


def _setup_forward(ctx, inputs, output):
    input, linear_weight, linear_bias, target, class_weight, ctx.smooth, *ctx.options = inputs
    shift, log_sum, _, _ = output
    ctx.mark_non_differentiable(shift)
    ctx.save_for_backward(input, linear_weight, linear_bias, target, class_weight, shift, log_sum)


def _autograd_forward(ctx, _, d_log_sum, d_nll, d_smoothed):
    input, linear_weight, linear_bias, target, class_weight, shift, log_sum = ctx.saved_tensors
    total = linear_weight.shape[0] if class_weight is None else class_weight.to(shift.dtype).sum()
    need = ctx.needs_input_grad
    d_input, d_weight, d_bias = _backward(
        *coefficients(
            d_log_sum, d_nll, d_smoothed if ctx.smooth else None, target, ctx.options[0], total
        ),
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        shift,
        log_sum,
        *ctx.options,
        need[0],
        need[1],
    )
    return (
        d_input if need[0] else None,
        d_weight if need[1] else None,
        d_bias if need[2] else None,
        *[None] * 6,
    )


def _setup_loss(ctx, inputs, output):
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)


def _autograd_loss(ctx, d_loss, *_):
    need = ctx.needs_input_grad
    gradients = [g * d_loss if n else None for g, n in zip(ctx.saved_tensors, need)]
    return *gradients, *[None] * 10


_forward = register(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? class_weight, bool smooth, int ignore_index, float? softcap, float logit_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    implementations={"reference": reference.linear_cross_entropy_forward},
    setup_context=_setup_forward,
    backward=_autograd_forward,
)
_backward = register(
    "linear_cross_entropy_backward(Tensor on_p, Tensor on_target, Tensor? on_all, Tensor input,"
    " Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? class_weight, Tensor shift,"
    " Tensor log_sum, int ignore_index, float? softcap, float logit_scale, bool need_input,"
    " bool need_weight) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={"reference": reference.linear_cross_entropy_backward},
    picked_by=3,
)
_loss = register(
    "linear_cross_entropy_loss(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? class_weight, Tensor on_nll, Tensor? on_smoothed, Tensor? on_square, int ignore_index,"
    " float? softcap, float logit_scale, bool need_input, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_loss_fake,
    implementations={"reference": reference.linear_cross_entropy_loss},
    setup_context=_setup_loss,
    backward=_autograd_loss,
)
