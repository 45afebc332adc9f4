"""The definition of `linear_distillation`."""

import math

import torch
from torch import Tensor

from fastlm.reference.blocks import row_blocks
from fastlm.reference.precision import widen


def linear_distillation_forward(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    keep: Tensor | None,
    kind: str,
    beta: float,
    logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    unit: float,
    need_student: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the rows' divergences and its gradients, all times `unit`.

    A gradient is empty where it is not needed. `keep` is (N) bool: the other rows do not contribute
    to any result.
    """
    if keep is not None:
        student = student.masked_fill(~keep[:, None], 0.0)
        teacher = teacher.masked_fill(~keep[:, None], 0.0)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss, w = student.new_zeros((), dtype=wide), widen(student_weight)
    d_student, d_weight = [], torch.zeros_like(w)
    for b in row_blocks(student.shape[0], w.shape[0]):
        x = widen(student[b])
        z = _scores(x, w, logit_scale, student_softcap)
        z_t = _scores(widen(teacher[b]), widen(teacher_weight), logit_scale, teacher_softcap)
        losses, dz = _divergence(z.log_softmax(-1), z_t.log_softmax(-1).to(wide), kind, beta)
        if student_softcap is not None:
            dz = dz * (1 - (z / (student_softcap * logit_scale)).square())
        if keep is not None:
            losses, dz = losses * keep[b], dz * keep[b, None]
        loss = loss + (losses * unit).sum()
        dz = dz * (logit_scale * unit)
        if need_student:
            d_student.append(dz @ w)
        if need_weight:
            d_weight = d_weight + dz.t() @ x
    empty = student.new_empty(0)
    return (
        loss,
        torch.cat(d_student).to(student.dtype) if need_student else empty,
        d_weight if need_weight else empty.to(wide),
    )


def linear_distillation_backward(
    d_loss: Tensor, d_student: Tensor, d_weight: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients from linear_distillation_forward times the gradient of its loss."""
    return (d_student * d_loss).to(d_student.dtype), (d_weight * d_loss).to(weight_dtype)


def _scores(x: Tensor, w: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    z = x @ w.t()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) * logit_scale


def _divergence(log_s: Tensor, log_t: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row and its gradient with respect to the student's scores."""
    s, t = log_s.exp(), log_t.exp()
    if kind == "forward":
        return _expectation(t, log_t - log_s), s - t
    other, share = log_t, 1.0
    if kind == "jsd":
        other, share = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta)), 1 - beta
    log_ratio = log_s - other
    mean = _expectation(s, log_ratio)
    dz = share * (s * (log_ratio - mean[:, None])).masked_fill(s == 0, 0.0)
    if kind == "jsd":
        return beta * _expectation(t, log_t - other) + (1 - beta) * mean, dz
    return mean, dz


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Return the sum of p x over the classes. A probability of 0 contributes 0, whatever x is."""
    return (p * x.masked_fill(p == 0, 0.0)).sum(-1)
