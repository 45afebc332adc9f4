"""cross_entropy by csrc/cpu/cross_entropy.h.

This file allocates the results and a few float32 per row, and refuses targets out of range.
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import cpu_extension as _cpu
from fastlm.cpu.templates import empty_float32, scalar

# Up to this number of rows the statistics of a loss need no memory
_FEW_ROWS = _cpu.CROSS_ENTROPY_FEW_ROWS if _cpu else 0


def check_target(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Return a contiguous target after checking that every class in it is in range."""
    target = target.contiguous()
    if (row := _cpu.first_bad_target(target, classes, ignore_index)) >= 0:
        raise reference.bad_target(target, row, classes, ignore_index)
    return target


def expand_weights(class_weight: Tensor | None, smooth: bool, classes: int) -> Tensor | None:
    """Return (V) or (N, V) weights of the sum over all classes, or None without that sum. Weights
    per row may be 16-bit."""
    if not smooth:
        return None
    if class_weight is None:
        return torch.ones(classes, dtype=torch.float32, device="cpu")
    return (class_weight if class_weight.dim() == 2 else class_weight.float()).contiguous()


def contiguous_rows(t: Tensor) -> Tensor:
    """Return a matrix with any row stride but contiguous rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def cross_entropy_forward(logits, target, class_weight, smooth, ignore_index, softcap, logit_scale):
    n, classes = logits.shape
    shift = logits.new_empty(n, dtype=torch.float32)
    log_sum, nll = torch.empty_like(shift), torch.empty_like(shift)
    smoothed = shift.new_empty(n if smooth else 0)
    _cpu.cross_entropy_forward(
        contiguous_rows(logits),
        check_target(target, classes, ignore_index),
        expand_weights(class_weight, smooth, classes),
        ignore_index,
        softcap or 0.0,
        logit_scale,
        shift,
        log_sum,
        nll,
        smoothed,
    )
    return shift, log_sum, nll, smoothed


def cross_entropy_backward(
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
        contiguous_rows(logits),
        target.contiguous(),
        expand_weights(class_weight, on_all is not None, logits.shape[1]),
        shift,
        log_sum,
        ignore_index,
        softcap or 0.0,
        logit_scale,
        d_logits,
    )
    return d_logits


def cross_entropy_loss(logits, target, ignore_index, mean, softcap, logit_scale, keep):
    loss, n = torch.empty_like(scalar()), target.shape[0]
    stats = scalar().new_empty(3, n) if keep or n > _FEW_ROWS else None
    target = target.contiguous()
    rows = logits if logits.is_contiguous() else contiguous_rows(logits)
    row = _cpu.cross_entropy_loss(
        rows, target, ignore_index, mean, softcap or 0.0, logit_scale, loss, stats
    )
    if row >= 0:
        raise reference.bad_target(target, row, logits.shape[1], ignore_index)
    return loss, stats if keep and stats is not None else torch.empty_like(empty_float32())


def cross_entropy_loss_backward(
    d_loss, logits, target, stats, ignore_index, mean, softcap, logit_scale
):
    contiguous = logits.is_contiguous()
    d_logits = torch.empty_like(logits) if contiguous else logits.new_empty(logits.shape)
    _cpu.cross_entropy_loss_backward(
        d_loss,
        logits if contiguous else contiguous_rows(logits),
        target.contiguous(),
        stats,
        ignore_index,
        mean,
        softcap or 0.0,
        logit_scale,
        d_logits,
    )
    return d_logits
