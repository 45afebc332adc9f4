"""Cross-entropy of a linear layer's outputs, without the (N, V) logits ever being in memory.

There are two paths on one pair of kernels (csrc/cpu/linear_cross_entropy.h):

- "sum" and "mean": the gradient of each row is known in the forward up to one factor. It is
  computed there, one chunk of rows after another, while the chunk's exponentials are in memory.
  This takes 3 matrix products (`linear_cross_entropy_loss`).
- "none", or with lse: the gradient of each row is known only in the backward. The forward computes
  lse and the backward recomputes the logits. This takes 4 matrix products (`linear_cross_entropy`,
  `linear_cross_entropy_backward`). Few rows take this path too: it writes the weight's gradient
  only once, in the weight's dtype, and that write dominates their time.

Where the products are so small that the calls around them dominate, the loss is computed by its
definition: float32 logits in memory and `cross_entropy` on them. Those products are torch's, whose
last bit may depend on the number of threads and on the operands' addresses (seen on a Zen 4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import reference
from fastlm.backend import backend_for
from fastlm.errors import InputError
from fastlm.operator import autocast, declare, is_any_autocast_on
from fastlm.ops.cross_entropy import (
    check,
    check_options,
    coefficients,
    cross_entropy,
)
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.reference.precision import wide_dtype
from fastlm.row_losses import row_factors, row_losses
from fastlm.transforms import is_eager, wants_gradient

_FEW_ROWS = 64  # at 100 to 200 the fourth product costs as much as a float32 gradient of the weight
# Rows x features x classes up to which the definition takes less time than the calls of the
# kernels: a fifth of their time at 4 thousand, the same at 2 to 4 million.
_MAX_SMALL_PRODUCT = 1 << 20
# Gradients computed in the forward do not have GradScaler's factor yet. In float16 a mean over a
# thousand rows would lose all but the targets' classes, and the input's gradient its last bits. 64
# is GradScaler's first factor, 2^16, over 1024 rows: a class's share of 1e-9 does not underflow,
# and weights of up to 256 do not overflow.
_HALF_PEAK = 64.0


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
        input: (..., K), float32, bfloat16 or float16 (float64 on the reference).
        linear_weight: (V, K), input's dtype.
        target: (...), int64 or int32.
        linear_bias: (V,), any float dtype.
        others: as in `cross_entropy`.

    Under ``torch.autocast`` input and linear_weight are cast to its dtype, as by F.linear. Logits,
    sums and lse are float32; the gradient of the logits is rounded to input's dtype for the matrix
    products that follow it, which sum in float32. Memory in addition to the gradients: 32 to 64 MiB
    of workspace (more for a weight of more than 64 Mi elements) and, for a 16-bit weight, the
    float32 sum of its gradient. Products of a few rows need at most 4 MiB each for the logits and
    for a 16-bit weight in float32.

    Raises:
        InputError: shapes, dtypes or options that do not fit; on the CPU also a target out of
        range.
    """
    try:
        if is_any_autocast_on():
            input, linear_weight = autocast(input, linear_weight)
        classes = check_linear(input, linear_weight, linear_bias)
        check(input, "input", classes, target, weight, label_smoothing)
        check_options(softcap, reduction, num_items)
        if (
            is_eager(input, linear_weight, target)  # first: a traced size would add a guard
            and target.numel() <= _FEW_ROWS
            and target.numel() * linear_weight.numel() <= _MAX_SMALL_PRODUCT
            and backend_for("linear_cross_entropy", input) == "cpu"
            and ignore_index
            not in target.reshape(-1).tolist()  # ignored rows must not reach dw, even as NaN
        ):
            logits = _float32_logits(input, linear_weight, linear_bias)
            return cross_entropy(
                logits,
                target,
                weight=weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                softcap=softcap,
                logit_scale=logit_scale,
                reduction=reduction,
                num_items=num_items,
                return_lse=return_lse,
            )
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
            wide_dtype(input),
        )
        options = (ignore_index, softcap, logit_scale)
        smoothing_weight = weight if label_smoothing else None
        need_input, need_weight, need_bias = (
            t is not None and wants_gradient(t) for t in (input, linear_weight, linear_bias)
        )
        if (
            (need_input or need_weight or need_bias)
            and reduction != "none"
            and len(flat) > _FEW_ROWS
            and not return_lse
            and not (softcap is not None and label_smoothing)
        ):
            unit = (
                _gradient_unit(*factors[:2], classes, logit_scale)
                if input.dtype is torch.float16
                else None
            )
            if unit is not None:
                factors = tuple(f if f is None else f * unit for f in factors)
            loss = _loss(
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
            return loss if unit is None else loss / unit
        shift, log_sum, nll, smoothed = _forward(
            flat, linear_weight, linear_bias, rows, smoothing_weight, label_smoothing > 0, *options
        )
        lse = shift + log_sum
        loss = row_losses(*factors, nll, smoothed, lse, rows != ignore_index)
        loss = loss.view(target.shape) if reduction == "none" else loss.sum()
        return (loss, lse.view(target.shape)) if return_lse else loss
    except TYPE_FAILURES as error:
        raise explain(error, linear_cross_entropy, locals()) from None


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> int:
    """Check the operands of the linear layer and return the number of classes."""
    if linear_weight.dim() != 2 or input.dim() == 0 or linear_weight.shape[1] != input.shape[-1]:
        raise InputError(
            "linear_weight: expected shape (V, K), K the last dimension of input"
            f" {tuple(input.shape)}, got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dtype != input.dtype or linear_weight.device != input.device:
        raise InputError(
            f"linear_weight: expected {input.dtype} on {input.device} as input,"
            f" got {linear_weight.dtype} on {linear_weight.device}"
        )
    classes = linear_weight.shape[0]
    if input.shape[-1] == 0:
        raise InputError(f"input: expected at least one feature, got shape {tuple(input.shape)}")
    if linear_bias is not None and (
        linear_bias.shape != (classes,)
        or not linear_bias.is_floating_point()
        or linear_bias.device != input.device
    ):
        raise InputError(
            f"linear_bias: expected floats of shape ({classes},) on {input.device},"
            f" got {linear_bias.dtype} {tuple(linear_bias.shape)} on {linear_bias.device}"
        )
    return classes


def _gradient_unit(
    on_nll: Tensor, on_smoothed: Tensor | None, classes: int, logit_scale: float
) -> Tensor:
    """Return a power of two that brings the largest coefficient of a logit's gradient to
    `_HALF_PEAK`."""
    largest = on_nll if on_smoothed is None else on_nll + on_smoothed * classes
    # the unit is 1 without rows, or where every row's factor is 0
    largest = F.pad(largest.detach(), (0, 1)).amax() * abs(logit_scale)
    largest = torch.where((largest > 0) & (largest < torch.inf), largest, _HALF_PEAK)
    return torch.exp2(-torch.log2(largest / _HALF_PEAK).floor())


def _float32_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return _float32_logits(input, linear_weight, linear_bias)
    if linear_bias is not None and linear_bias.dtype is not torch.float32:
        linear_bias = linear_bias.float()
    if input.dtype is not torch.float32:
        input, linear_weight = input.float(), linear_weight.float()
    return F.linear(input, linear_weight, linear_bias)


def _derivative(
    d_log_sum: Tensor | None,
    d_nll: Tensor,
    d_smoothed: Tensor | None,
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
    need_linear_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = linear_weight.shape[0]
    if class_weight is not None:  # contiguous: torch adds strided elements in another order
        total = class_weight.contiguous().sum(dtype=shift.dtype)
    return _backward(
        *coefficients(d_log_sum, d_nll, d_smoothed, target, ignore_index, total),
        input, linear_weight, linear_bias, target, class_weight, shift, log_sum, ignore_index,
        softcap, logit_scale, need_input, need_linear_weight,
    )  # fmt: skip


def _logits_flops(input, linear_weight, *_, **__):
    return 2 * math.prod(input) * linear_weight[0]


def _backward_flops(on_p, on_target, on_all, *rest, **_):
    return _loss_flops(*rest)  # recomputes the logits: as many products as the loss with gradients


def _loss_flops(input, linear_weight, *options, **_):
    need_input, need_weight = options[-2:]
    return (1 + need_input + need_weight) * _logits_flops(input, linear_weight)


_backward = declare(
    reference.linear_cross_entropy_backward,
    "cpu triton",
    dispatch_arg="input",
    flops=_backward_flops,
)
_forward = declare(
    reference.linear_cross_entropy_forward,
    "cpu triton",
    outputs="shift log_sum nll smoothed?",
    backward=_derivative,
    gradients=("input", "linear_weight", "linear_bias"),
    zeros_like={"d_nll": "shift"},
    non_differentiable=["shift"],
    flops=_logits_flops,
)
_loss_backward = declare(
    reference.linear_cross_entropy_loss_backward, "cpu triton", dispatch_arg="d_input"
)
_loss = declare(  # the gradients are differentiable: a second derivative is refused, not zero
    reference.linear_cross_entropy_loss,
    "cpu triton",
    outputs="loss d_input d_weight d_bias",
    backward=_loss_backward,
    gradients=("input", "linear_weight", "linear_bias"),
    saves={
        "weight_dtype": lambda linear_weight: linear_weight.dtype,
        "bias_dtype": lambda input, linear_bias: (
            (input if linear_bias is None else linear_bias).dtype
        ),
    },
    flops=_loss_flops,
)
