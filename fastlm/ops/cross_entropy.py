"""Cross-entropy over the last dimension, with every option around one flag-free kernel.

The kernel gives, per row, ``shift``, ``log_sum`` (lse = shift + log_sum), ``nll`` and, for label
smoothing, the sum of all classes' nll; class weights, smoothing, z-loss, reduction and ignored
rows are arithmetic on those (N,) vectors in plain torch, so autograd hands the backward kernel
three coefficients a row:

    dz[v] = on_p * softmax(z)[v] - on_target * (v == target) - on_all * class_weight[v]

The plain sum or mean is an operator of its own around the same rows (`cross_entropy_loss`): on few
rows that arithmetic, a dozen torch ops with its gradient, cost three times what torch's loss does.

lse travels as two numbers because a sum rounded at 1e4 (a common offset of the logits) would cost
every probability 1e-3. Rejected: one fused kernel with a branch per option (Liger's takes 18
flags), and gradients written in the forward (they need a second pass when the upstream gradient is
not 1).
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import CudaKernel, Kernel
from fastlm.backend import cpu_extension as _cpu
from fastlm.errors import InputError
from fastlm.operator import register
from fastlm.ops.wrong_type import FAILURES, explained
from fastlm.transforms import wants_gradient

_CLASS_NUMBERS = (torch.int64, torch.int32)
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")  # empty_like: 0.3 us less than empty
_STATS_ON_STACK = 64  # rows, as in csrc/cpu/cross_entropy.h
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


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
    ``F.cross_entropy(z, target, ...) + z_loss * logsumexp(z) ** 2`` a row, in float32.

    Args:
        logits: (..., V): classes are the last dimension. float32, bfloat16 or float16 (float64 on
            the reference).
        target: (...), int64 or int32 class of each row.
        weight: (V,), weight of each class, as torch's. The z-loss of a row is not weighted.
        ignore_index: rows with this target have no loss and no gradient.
        label_smoothing: in [0, 1], as torch's.
        z_loss: factor of lse^2 (PaLM, arXiv:2204.02311).
        softcap: > 0, or None.
        reduction: "none", "sum" or "mean": over the rows not ignored (their weights with `weight`).
            With every row ignored the mean is NaN (its gradient 0), as torch's; with `num_items` it
            is 0.
        num_items: divide by this in place of the rows seen here (the tokens of all micro-batches
            or ranks). A tensor is not waited for.
        return_lse: also return logsumexp(z), (...), differentiable, ignored rows included.

    Returns:
        The float32 loss: a scalar, or (...) for "none"; with `return_lse` a pair.

    Forward reads the logits once; backward reads them once and writes the gradient, in their
    dtype, once. Kept between the two: the logits and two or three float32 a row.

    Raises:
        InputError: shapes or options that do not fit; on the CPU also a target out of range.
    """
    try:
        shape = logits.shape
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
            return loss if num_items is None else loss / one_number(num_items)
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
    except FAILURES as error:
        raise explained(error, cross_entropy, locals()) from None


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
    """Factors (N) of nll, smoothed and lse^2 whose products add up to the rows' losses,
    reduction included.
    """
    valid = target != ignore_index
    seen = each = valid.to(dtype)
    if (
        weight is not None
    ):  # clamp: a target out of range is refused by the kernel, not by this look-up
        seen = torch.where(valid, weight.detach().to(dtype)[target.clamp(0, classes - 1)], 0.0)
    if reduction == "mean":
        share = 1.0 / (seen.sum() if num_items is None else one_number(num_items))
        seen, each = seen * share, each * share
    on_nll = seen * (1.0 - label_smoothing)
    on_smoothed = each * (label_smoothing / classes) if label_smoothing else None
    return on_nll, on_smoothed, each * z_loss if z_loss else None


def row_losses(
    on_nll: Tensor,
    on_smoothed: Tensor | None,
    on_square: Tensor | None,
    nll: Tensor,
    smoothed: Tensor,
    lse: Tensor,
    valid: Tensor,
) -> Tensor:
    """(N). `where`, not a factor of 0: an infinite lse of an ignored row stays out of loss
    and gradient.
    """
    loss = on_nll * nll
    if on_smoothed is not None:
        loss = loss + on_smoothed * torch.where(valid, smoothed, 0.0)
    if on_square is not None:
        loss = loss + on_square * torch.where(valid, lse, 0.0).square()
    return loss


def check(
    x: Tensor, name: str, classes: int, target: Tensor, weight: Tensor | None, smoothing: float
) -> None:
    shape = x.shape
    if not shape or not x.is_floating_point():
        raise InputError(
            f"{name}: wanted a float tensor (..., features), got {x.dtype} {tuple(shape)}"
        )
    if classes == 0:
        raise InputError(f"{name}: wanted at least one class, got shape {tuple(shape)}")
    if target.dtype not in _CLASS_NUMBERS:
        raise InputError(f"target: wanted int64 class numbers, got {target.dtype}")
    if target.shape != shape[:-1]:
        raise InputError(
            f"target: wanted shape {tuple(shape[:-1])} (the rows of {name}),"
            f" got {tuple(target.shape)}"
        )
    if not (target.is_cpu and x.is_cpu) and target.device != x.device:
        raise InputError(f"target: wanted device {x.device} as {name}, got {target.device}")
    if weight is not None and (
        weight.shape != (classes,) or weight.device != x.device or not weight.is_floating_point()
    ):
        raise InputError(
            f"weight: wanted floats of shape ({classes},) on {x.device},"
            f" got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    if not 0.0 <= smoothing <= 1.0:
        raise InputError(f"label_smoothing: wanted 0 to 1, got {smoothing}")


def check_options(softcap: float | None, reduction: str, num_items: int | Tensor | None) -> None:
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap: wanted > 0 or None, got {softcap}")
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f"reduction: wanted none, mean or sum, got {reduction!r}")
    if num_items is not None:
        if reduction != "mean":
            raise InputError(f"num_items: wanted reduction 'mean', got {reduction!r}")
        if isinstance(num_items, Tensor):
            if num_items.numel() != 1:
                raise InputError(
                    f"num_items: wanted one number, got shape {tuple(num_items.shape)}"
                )
        elif not num_items > 0:
            raise InputError(f"num_items: wanted > 0, got {num_items}")


def one_number(num_items: int | Tensor) -> int | Tensor:
    """Without the dimension that (1,) would add to a scalar loss."""
    return num_items.reshape(()) if isinstance(num_items, Tensor) else num_items


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(logits, target, class_weight, smooth, ignore_index, softcap, logit_scale):
    per_row = [logits.new_empty(target.shape, dtype=wide(logits)) for _ in range(3)]
    return *per_row, logits.new_empty(target.shape if smooth else 0, dtype=wide(logits))


def _backward_fake(
    on_p,
    on_target,
    on_all,
    logits,
    target,
    class_weight,
    shift,
    log_sum,
    ignore_index,
    softcap,
    logit_scale,
):
    return logits.new_empty(logits.shape)


def _loss_fake(logits, target, ignore_index, mean, softcap, logit_scale, keep):
    stats = logits.new_empty((3, *target.shape) if keep else 0, dtype=wide(logits))
    return stats.new_empty(()), stats


def _loss_backward_fake(d_loss, logits, target, stats, ignore_index, mean, softcap, logit_scale):
    return logits.new_empty(logits.shape)


def checked_target(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Contiguous, after every class in it was found in range."""
    target = target.contiguous()
    if (row := _cpu.first_bad_target(target, classes, ignore_index)) >= 0:
        raise reference.bad_target(target, row, classes, ignore_index)
    return target


def all_weights(class_weight: Tensor | None, smooth: bool, classes: int) -> Tensor | None:
    """(V) float32 weights of the sum over all classes, or None without one."""
    if not smooth:
        return None
    if class_weight is None:
        return torch.ones(classes, dtype=torch.float32, device="cpu")
    return class_weight.float().contiguous()


def _rows(t: Tensor) -> Tensor:
    """Rows may be apart, elements of a row may not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _cpu_forward(logits, target, class_weight, smooth, ignore_index, softcap, logit_scale):
    n, classes = logits.shape
    shift = logits.new_empty(n, dtype=torch.float32)
    log_sum, nll = torch.empty_like(shift), torch.empty_like(shift)
    smoothed = shift.new_empty(n if smooth else 0)
    _cpu.cross_entropy_forward(
        _rows(logits),
        checked_target(target, classes, ignore_index),
        all_weights(class_weight, smooth, classes),
        ignore_index,
        softcap or 0.0,
        logit_scale,
        shift,
        log_sum,
        nll,
        smoothed,
    )
    return shift, log_sum, nll, smoothed


def _cpu_backward(
    on_p,
    on_target,
    on_all,
    logits,
    target,
    class_weight,
    shift,
    log_sum,
    ignore_index,
    softcap,
    logit_scale,
):
    d_logits = logits.new_empty(logits.shape)
    _cpu.cross_entropy_backward(
        on_p.contiguous(),
        on_target.contiguous(),
        None if on_all is None else on_all.contiguous(),
        _rows(logits),
        target.contiguous(),
        all_weights(class_weight, on_all is not None, logits.shape[1]),
        shift,
        log_sum,
        ignore_index,
        softcap or 0.0,
        logit_scale,
        d_logits,
    )
    return d_logits


def _cpu_loss(logits, target, ignore_index, mean, softcap, logit_scale, keep):
    loss, n = torch.empty_like(_SCALAR), target.shape[0]
    stats = _SCALAR.new_empty(3, n) if keep or n > _STATS_ON_STACK else None
    target = target.contiguous()
    rows = logits if logits.is_contiguous() else _rows(logits)
    row = _cpu.cross_entropy_loss(
        rows, target, ignore_index, mean, softcap or 0.0, logit_scale, loss, stats
    )
    if row >= 0:
        raise reference.bad_target(target, row, logits.shape[1], ignore_index)
    return loss, stats if keep and stats is not None else _NOTHING


def _cpu_loss_backward(d_loss, logits, target, stats, ignore_index, mean, softcap, logit_scale):
    contiguous = logits.is_contiguous()
    d_logits = torch.empty_like(logits) if contiguous else logits.new_empty(logits.shape)
    _cpu.cross_entropy_loss_backward(
        d_loss,
        logits if contiguous else _rows(logits),
        target.contiguous(),
        stats,
        ignore_index,
        mean,
        softcap or 0.0,
        logit_scale,
        d_logits,
    )
    return d_logits


def _setup_context(ctx, inputs, output):
    logits, target, class_weight, ctx.smooth, *ctx.options = inputs
    shift, log_sum, _, _ = output
    ctx.mark_non_differentiable(shift)
    ctx.save_for_backward(logits, target, class_weight, shift, log_sum)
    ctx.set_materialize_grads(False)


def coefficients(
    d_log_sum: Tensor | None,
    d_nll: Tensor,
    d_smoothed: Tensor | None,
    target: Tensor,
    ignore_index: int,
    total_weight,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """on_p, on_target, on_all of the module's docstring from the gradients of the forward's
    outputs (None: nothing depends on it).
    """
    d_nll = torch.where(target == ignore_index, 0.0, d_nll)
    on_p = d_nll if d_log_sum is None else d_log_sum + d_nll
    return (on_p if d_smoothed is None else on_p + total_weight * d_smoothed), d_nll, d_smoothed


def _autograd_backward(ctx, _, d_log_sum, d_nll, d_smoothed):
    logits, target, class_weight, shift, log_sum = ctx.saved_tensors
    if d_nll is None:
        d_nll = torch.zeros_like(shift)
    total = logits.shape[1] if class_weight is None else class_weight.to(shift.dtype).sum()
    d_logits = _backward(
        *coefficients(
            d_log_sum, d_nll, d_smoothed if ctx.smooth else None, target, ctx.options[0], total
        ),
        logits,
        target,
        class_weight,
        shift,
        log_sum,
        *ctx.options,
    )
    return d_logits, None, None, None, None, None, None


def _setup_loss(ctx, inputs, output):
    logits, target, *ctx.options, _ = inputs
    stats = output[1]
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, target, stats)
    ctx.set_materialize_grads(False)  # else the backward begins with zeros like stats


def _autograd_loss(ctx, d_loss, _):
    d_logits = None if d_loss is None else _loss_backward(d_loss, *ctx.saved_tensors, *ctx.options)
    return d_logits, None, None, None, None, None, None


_forward = register(
    "cross_entropy(Tensor logits, Tensor target, Tensor? class_weight, bool smooth,"
    " int ignore_index, float? softcap, float logit_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    implementations={
        "reference": reference.cross_entropy_forward,
        "cpu": _cpu_forward,
        "triton": Kernel("cross_entropy", "cross_entropy_forward"),
        "cuda": CudaKernel("cross_entropy", "cross_entropy_forward"),
    },
    setup_context=_setup_context,
    backward=_autograd_backward,
)
_backward = register(
    "cross_entropy_backward(Tensor on_p, Tensor on_target, Tensor? on_all, Tensor logits,"
    " Tensor target, Tensor? class_weight, Tensor shift, Tensor log_sum, int ignore_index,"
    " float? softcap, float logit_scale) -> Tensor",
    fake=_backward_fake,
    implementations={
        "reference": reference.cross_entropy_backward,
        "cpu": _cpu_backward,
        "triton": Kernel("cross_entropy", "cross_entropy_backward"),
        "cuda": CudaKernel("cross_entropy", "cross_entropy_backward"),
    },
    picked_by=3,
)
_loss = register(
    "cross_entropy_loss(Tensor logits, Tensor target, int ignore_index, bool mean, float? softcap,"
    " float logit_scale, bool keep) -> (Tensor, Tensor)",
    fake=_loss_fake,
    implementations={
        "reference": reference.cross_entropy_loss,
        "cpu": _cpu_loss,
        "triton": Kernel("cross_entropy", "cross_entropy_loss"),
        "cuda": CudaKernel("cross_entropy", "cross_entropy_loss"),
    },
    setup_context=_setup_loss,
    backward=_autograd_loss,
)
_loss_backward = register(
    "cross_entropy_loss_backward(Tensor d_loss, Tensor logits, Tensor target, Tensor stats,"
    " int ignore_index, bool mean, float? softcap, float logit_scale) -> Tensor",
    fake=_loss_backward_fake,
    implementations={
        "reference": reference.cross_entropy_loss_backward,
        "cpu": _cpu_loss_backward,
        "triton": Kernel("cross_entropy", "cross_entropy_loss_backward"),
        "cuda": CudaKernel("cross_entropy", "cross_entropy_loss_backward"),
    },
    picked_by=1,
)
