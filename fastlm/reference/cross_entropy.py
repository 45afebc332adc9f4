"""The definition of `cross_entropy`."""

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.reference.blocks import concatenate, row_blocks
from fastlm.reference.precision import widen
from fastlm.reference.target import check_target


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the terms of a cross-entropy of each row, z = softcap(logit_scale * logits) (N, V).

    shift (N) = max z;  log_sum (N) = log sum exp(z - shift), so lse = shift + log_sum;
    nll (N) = lse - z[target], 0 where the target is ignored;
    smoothed (N; empty unless `smooth`) = sum over v of class_weight[v] * (lse - z[v]), with class
    weights (V), or (N, V) of each row.
    """
    if logits.shape[1] == 0:
        raise InputError(f"logits: expected at least one class, got shape {tuple(logits.shape)}")
    check_target(target, logits.shape[1], ignore_index)
    options = (smooth, ignore_index, softcap, logit_scale)
    parts = [
        cross_entropy_rows(logits[b], target[b], _slice_weights(class_weight, b), *options)
        for b in row_blocks(*logits.shape)
    ]
    shift, log_sum, nll, smoothed = (torch.cat(part) for part in zip(*parts))
    return shift, log_sum, nll, smoothed


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = _softcapped_logits(logits, softcap, logit_scale)
    shift = z.amax(1).detach()  # any constant will do: the backward has no gradient for it
    z = z - shift[:, None]
    log_sum = z.exp().sum(1).log()
    ignored = target == ignore_index
    at_target = z.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    nll = (log_sum - at_target).masked_fill(ignored, 0)
    if not smooth:
        return shift, log_sum, nll, z.new_empty(0)
    logp = log_sum[:, None] - z
    return (
        shift,
        log_sum,
        nll,
        (logp if class_weight is None else logp * widen(class_weight)).sum(1),
    )


def cross_entropy_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Return the gradient of the logits, from dz, which is

    dz[v] = on_p * p[v] - on_target * (v == target) - on_all * class_weight[v]
    """
    parts = (
        cross_entropy_rows_backward(
            on_p[b],
            on_target[b],
            None if on_all is None else on_all[b],
            logits[b],
            target[b],
            _slice_weights(class_weight, b),
            shift[b],
            log_sum[b],
            ignore_index,
            softcap,
            logit_scale,
        )
        for b in row_blocks(*logits.shape)
    )
    return concatenate(parts, logits.shape[0])


def cross_entropy_rows_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    z = _softcapped_logits(logits, softcap, logit_scale)
    dz = on_p[:, None] * (z - shift[:, None] - log_sum[:, None]).exp()
    ignored = target == ignore_index
    dz = dz.scatter_add(
        1,
        target.masked_fill(ignored, 0)[:, None],
        on_target.masked_fill(ignored, 0).neg()[:, None],
    )
    if on_all is not None:
        dz = dz - on_all[:, None] * (1.0 if class_weight is None else widen(class_weight))
    if softcap is not None:
        dz = dz * (1 - (z / softcap).square())
    return (dz * logit_scale).to(logits.dtype)


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    softcap: float | None,
    logit_scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sum of `cross_entropy_forward`'s nll, or the mean over rows that are not ignored.

    With `keep` also return its (shift, log_sum, nll) as one (3, N), otherwise an empty tensor.
    """
    shift, log_sum, nll, _ = cross_entropy_forward(
        logits, target, None, False, ignore_index, softcap, logit_scale
    )
    loss = nll.sum()
    if mean:
        loss = loss / (target != ignore_index).sum()
    return loss, torch.stack((shift, log_sum, nll)) if keep else nll.new_empty(0)


def cross_entropy_loss_backward(
    d_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    ignore_index: int,
    mean: bool,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Return the gradient of `cross_entropy_loss`: 0 in ignored rows, even if the mean is NaN."""
    valid = target != ignore_index
    on_row = d_loss / valid.sum() if mean else d_loss
    on_p = torch.where(valid, on_row, 0.0).to(stats.dtype)
    shift, log_sum, _ = stats
    return cross_entropy_backward(
        on_p, on_p, None, logits, target, None, shift, log_sum, ignore_index, softcap, logit_scale
    )


def _slice_weights(class_weight: Tensor | None, rows: slice) -> Tensor | None:
    return class_weight if class_weight is None or class_weight.dim() == 1 else class_weight[rows]


def _softcapped_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = widen(logits) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
