"""Cross-entropy over the last dimension: every option is arithmetic around one kernel.

The kernel returns, per row, ``shift``, ``log_sum`` (lse = shift + log_sum), ``nll`` and, for label
smoothing, the sum of all classes' nll. Class weights, smoothing, z-loss, reduction and ignored rows
are arithmetic on those (N,) vectors in plain torch (`fastlm.row_losses`), so autograd passes three
coefficients per row to the backward kernel:

    dz[v] = on_p * softmax(z)[v] - on_target * (v == target) - on_all * class_weight[v]

The plain sum or mean is a separate operator around the same rows (`cross_entropy_loss`). On few
rows that arithmetic, a dozen torch ops with its gradient, took three times as long as torch's loss.

lse is passed as two numbers because a sum rounded at 1e4 (a common offset of the logits) would cost
every probability an error of 1e-3. Rejected: one fused kernel with a branch per option (Liger's has
18 flags), and gradients written in the forward (they need a second pass when the upstream gradient
is not 1).
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import Support
from fastlm.errors import InputError
from fastlm.operator import declare
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.reference.precision import wide_dtype
from fastlm.row_losses import as_scalar, row_factors, row_losses
from fastlm.transforms import wants_gradient

_CLASS_NUMBERS = (torch.int64, torch.int32)
_NO_CLASS = -100  # the default of ignore_index


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
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
    """``z = logits * logit_scale``, ``z = softcap * tanh(z / softcap)``, then
    ``F.cross_entropy(z, target, ...) + z_loss * logsumexp(z) ** 2`` per row, in float32.

    Args:
        logits: (..., V): classes are the last dimension. float32, bfloat16 or float16 (float64 on
            the reference).
        target: (...), int64 or int32 class of each row; or (..., V) floats, the probability of each
            class (soft targets, as in torch; constants).
        weight: (V,), weight of each class, as in torch. The z-loss of a row is not weighted.
        ignore_index: rows with this target have no loss and no gradient.
        label_smoothing: in [0, 1], as in torch.
        z_loss: factor of lse^2 (PaLM, arXiv:2204.02311).
        softcap: > 0, or None.
        reduction: "none", "sum" or "mean". The mean is over the rows that are not ignored (over
            their weights with `weight`), and over all rows with soft targets. With every row
            ignored it is NaN (its gradient 0), as in torch; with `num_items` it is 0.
        num_items: divide by this number (the tokens of all micro-batches or ranks) instead of the
            number of rows in this call. Nothing waits for the value of a tensor.
        return_lse: also return logsumexp(z), (...), differentiable, ignored rows included.

    Returns:
        The float32 loss: a scalar, or (...) for "none"; with `return_lse` the pair (loss, lse).

    The forward reads the logits once. The backward reads them once and writes the gradient once, in
    their dtype. Stored between the two: the logits and two or three float32 values per row.

    Raises:
        InputError: shapes or options that do not fit; on the CPU also a target out of range.
    """
    try:
        shape = logits.shape
        if target.dim() == len(shape) and target.is_floating_point():
            _check_soft_targets(logits, target, weight, ignore_index, label_smoothing)
            check_options(softcap, reduction, num_items)
            return _soft_target_loss(
                logits, target, weight, label_smoothing, z_loss, softcap, logit_scale, reduction,
                num_items, return_lse,
            )  # fmt: skip
        check(logits, "logits", shape[-1] if shape else 0, target, weight, label_smoothing)
        check_options(softcap, reduction, num_items)
        rows = target if target.dim() == 1 else target.reshape(-1)
        if rows.dtype is not torch.int64:
            rows = rows.long()
        if len(shape) != 2:
            logits = logits.reshape(-1, shape[-1])
        plain = weight is None and not label_smoothing and not z_loss and not return_lse
        if plain and reduction != "none":
            loss, _ = _loss(
                logits,
                rows,
                ignore_index,
                reduction == "mean" and num_items is None,
                softcap,
                logit_scale,
                wants_gradient(logits),
            )
            return loss if num_items is None else loss / as_scalar(num_items)
        shift, log_sum, nll, smoothed = _forward(
            logits,
            rows,
            weight if label_smoothing else None,
            label_smoothing > 0,
            ignore_index,
            softcap,
            logit_scale,
        )
        if plain:
            return nll.view(target.shape)
        lse = shift + log_sum
        on_nll, on_smoothed, on_square = row_factors(
            rows,
            weight,
            ignore_index,
            label_smoothing,
            z_loss,
            shape[-1],
            reduction,
            num_items,
            nll.dtype,
        )
        loss = row_losses(on_nll, on_smoothed, on_square, nll, smoothed, lse, rows != ignore_index)
        loss = loss.view(target.shape) if reduction == "none" else loss.sum()
        return (loss, lse.view(target.shape)) if return_lse else loss
    except TYPE_FAILURES as error:
        raise explain(error, cross_entropy, locals()) from None


def _soft_target_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    num_items: int | Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss for soft targets: sum over v of q[v] * (lse - z[v]).

    It is the kernels' `smoothed` with class weights q per row. No row has a target class.
    """
    shape, classes = target.shape[:-1], target.shape[-1]
    q = target.detach().reshape(-1, classes)
    if label_smoothing or weight is not None or q.dtype != logits.dtype:
        q = q.to(wide_dtype(logits)) * (1.0 - label_smoothing) + label_smoothing / classes
        q = q if weight is None else q * weight.detach().to(q.dtype)
    none = torch.full((q.shape[0],), _NO_CLASS, dtype=torch.int64, device=logits.device)
    shift, log_sum, _, loss = _forward(
        logits.reshape(-1, classes), none, q, True, _NO_CLASS, softcap, logit_scale
    )
    lse = shift + log_sum
    if z_loss:
        loss = loss + z_loss * lse.square()
    if reduction == "none":
        loss = loss.view(shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / (q.shape[0] if num_items is None else as_scalar(num_items))
    return (loss, lse.view(shape)) if return_lse else loss


def _check_soft_targets(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> None:
    classes = logits.shape[-1] if logits.dim() else 0
    check(logits, "logits", classes, None, weight, smoothing)
    if target.shape != logits.shape or target.device != logits.device:
        raise InputError(
            f"target: expected probabilities of shape {tuple(logits.shape)} on {logits.device} as"
            f" logits, got {tuple(target.shape)} on {target.device}"
        )
    if target.requires_grad:
        raise InputError("target: expected constants (detach them), got requires_grad")
    if ignore_index != _NO_CLASS:
        raise InputError(
            f"ignore_index: expected class numbers as target, got {ignore_index} with probabilities"
        )


def check(
    x: Tensor,
    name: str,
    classes: int,
    target: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
) -> None:
    """Check the arguments that all losses of rows have. target: the class of each row, or None."""
    shape = x.shape
    if not shape or not x.is_floating_point():
        raise InputError(
            f"{name}: expected a float tensor (..., features), got {x.dtype} {tuple(shape)}"
        )
    if classes == 0:
        raise InputError(f"{name}: expected at least one class, got shape {tuple(shape)}")
    if weight is not None and (
        weight.shape != (classes,) or weight.device != x.device or not weight.is_floating_point()
    ):
        raise InputError(
            f"weight: expected floats of shape ({classes},) on {x.device},"
            f" got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    if not 0.0 <= smoothing <= 1.0:
        raise InputError(f"label_smoothing: expected 0 to 1, got {smoothing}")
    if target is None:
        return
    if target.dtype not in _CLASS_NUMBERS:
        raise InputError(f"target: expected int64 class numbers, got {target.dtype}")
    if target.shape != shape[:-1]:
        raise InputError(
            f"target: expected shape {tuple(shape[:-1])} (the rows of {name}),"
            f" got {tuple(target.shape)}"
        )
    if not (target.is_cpu and x.is_cpu) and target.device != x.device:
        raise InputError(f"target: expected device {x.device} as {name}, got {target.device}")


def check_options(softcap: float | None, reduction: str, num_items: int | Tensor | None) -> None:
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap: expected > 0 or None, got {softcap}")
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f"reduction: expected none, mean or sum, got {reduction!r}")
    if num_items is not None:
        if reduction != "mean":
            raise InputError(f"num_items: expected reduction 'mean', got {reduction!r}")
        if isinstance(num_items, Tensor):
            if num_items.numel() != 1:
                raise InputError(
                    f"num_items: expected one number, got shape {tuple(num_items.shape)}"
                )
        elif not num_items > 0:
            raise InputError(f"num_items: expected > 0, got {num_items}")


def coefficients(
    d_log_sum: Tensor | None,
    d_nll: Tensor,
    d_smoothed: Tensor | None,
    target: Tensor,
    ignore_index: int,
    total_weight,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return on_p, on_target and on_all (see the module's docstring).

    They follow from the gradients of the forward's outputs (None: nothing depends on the output).
    """
    d_nll = torch.where(target == ignore_index, 0.0, d_nll)
    on_p = d_nll if d_log_sum is None else d_log_sum + d_nll
    return (on_p if d_smoothed is None else on_p + total_weight * d_smoothed), d_nll, d_smoothed


def _derivative(
    d_log_sum: Tensor | None,
    d_nll: Tensor,
    d_smoothed: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    total = logits.shape[1]
    if class_weight is not None:  # contiguous: torch adds strided elements in another order
        total = class_weight.contiguous().sum(-1, dtype=shift.dtype)
    return _backward(
        *coefficients(d_log_sum, d_nll, d_smoothed, target, ignore_index, total),
        logits, target, class_weight, shift, log_sum, ignore_index, softcap, logit_scale,
    )  # fmt: skip


def _hard_targets_only(class_weight: int) -> dict[str, Support]:
    """Return the arguments that the CUDA kernels support: they read the same class weights for all
    rows. `class_weight` is the position of that argument."""
    return {
        "cuda": Support(
            "class numbers as targets",
            lambda *args: args[class_weight] is None or args[class_weight].dim() == 1,
        )
    }


_backward = declare(
    reference.cross_entropy_backward,
    "cpu triton cuda",
    dispatch_arg="logits",
    supports=_hard_targets_only(5),
)
_forward = declare(
    reference.cross_entropy_forward,
    "cpu triton cuda",
    supports=_hard_targets_only(2),
    outputs="shift log_sum nll smoothed?",
    backward=_derivative,
    gradients=["logits"],
    zeros_like={"d_nll": "shift"},
    non_differentiable=["shift"],
)
_loss_backward = declare(
    reference.cross_entropy_loss_backward, "cpu triton cuda", dispatch_arg="logits"
)
_loss = declare(
    reference.cross_entropy_loss,
    "cpu triton cuda",
    outputs="loss stats",
    backward=_loss_backward,
    gradients=["logits"],
    non_differentiable=["stats"],
)
