"""Distillation of one language-model head into another, without either's (N, V) logits in memory.

The gradient of each row's divergence is known once both heads' scores of the row are known. One
operator therefore computes the loss and, where a gradient is needed, the gradients of the student's
side, one chunk of rows after another (csrc/cpu/linear_distillation.h). This takes 2 matrix products
without gradients and 4 with both. The backward scales the gradients of the forward.

The operator returns the sum over rows. The mean and `num_items` are a division of that scalar.
"""

import math

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.operator import autocast, declare, is_any_autocast_on
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.row_losses import as_scalar
from fastlm.transforms import is_traced, wants_gradient

KINDS = ("forward", "reverse", "jsd")
# The forward's gradients do not have GradScaler's factor yet. As in `linear_cross_entropy`, float16
# gradients are those of 64 times the loss: near the teacher they are small.
_HALF_PEAK = 64.0


def linear_distillation(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """The mean over rows of a divergence between
    ``s = softmax(F.linear(student, student_weight) / temperature)`` and
    ``t = softmax(F.linear(teacher, teacher_weight) / temperature)``:

    - "forward": ``KL(t || s) = sum(t * (log t - log s))``;
    - "reverse": ``KL(s || t)``;
    - "jsd": ``beta * KL(t || m) + (1 - beta) * KL(s || m)`` with ``m = beta * t + (1 - beta) * s``
      (Agarwal et al. 2024, "On-Policy Distillation of Language Models", arXiv:2306.13649).

    There is no factor ``temperature ** 2``. A class of probability 0 contributes 0.

    Args:
        student: (..., Ks) hidden states, float32, bfloat16 or float16 (float64 on the reference).
        student_weight: (V, Ks), student's dtype.
        teacher: (..., Kt) with student's leading dimensions. Any of the dtypes, float64 only with
            float64.
        teacher_weight: (V, Kt), teacher's dtype.
        beta: in (0, 1), of "jsd". At its ends the divergence is 0; "forward" and "reverse" are the
            limits of it divided by beta and by 1 - beta.
        temperature: > 0.
        mask: (...), bool or 0 and 1. Rows where it is 0 are left out: they may contain NaN or
            infinity, and their gradient is 0.
        num_items: divide the sum by this number (the tokens of all micro-batches or ranks) instead
            of the number of rows that the mask keeps.
        student_softcap, teacher_softcap: ``logits = softcap * tanh(logits / softcap)``, before the
            temperature; > 0, or None.

    Returns:
        The float32 loss, a scalar. A mean over no row is 0.

    Gradients reach student and student_weight. The teacher is a constant: one that requires a
    gradient gets none.

    Under ``torch.autocast`` all four tensors are cast to its dtype, as by F.linear. Scores, sums
    and logarithms are float32; the gradient of the scores is rounded to student's dtype, where the
    CPU multiplies that, for the products that follow it, which sum in float32. Memory in addition
    to the gradients: 64 MiB of workspace on the CPU (more for a weight of more than 128 Mi
    elements) and, for a 16-bit weight, the float32 sum of its gradient.

    Raises:
        InputError: shapes, dtypes or options that do not fit.
    """
    try:
        if is_any_autocast_on():
            student, student_weight = autocast(student, student_weight)
            teacher, teacher_weight = autocast(teacher, teacher_weight)
        _check(student, student_weight, teacher, teacher_weight, mask)
        _check_options(kind, beta, temperature, num_items, student_softcap, teacher_softcap)
        rows = student.reshape(-1, student.shape[-1])
        keep = None if mask is None else mask.detach().reshape(-1) != 0
        traced = is_traced()  # a trace may also be called where a gradient is needed
        unit = 1.0
        if student.dtype is torch.float16:
            unit = 2.0 ** math.floor(math.log2(_HALF_PEAK * temperature))
        loss = _loss(
            rows,
            student_weight,
            teacher.detach().reshape(-1, teacher.shape[-1]),
            teacher_weight.detach(),
            keep,
            kind,
            beta,
            1.0 / temperature,
            student_softcap,
            teacher_softcap,
            unit,
            traced or wants_gradient(student),
            traced or wants_gradient(student_weight),
        )[0]
        if num_items is not None:
            items = as_scalar(num_items)
        else:
            items = rows.shape[0] if keep is None else keep.sum()
        # as `fastlm.train.losses.aggregate`: the sum over no row is 0, and so is its mean
        items = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
        # a tensor, as torch's tangent of a scalar over a Python number is float64
        divisor = loss.new_ones(()) * items * unit
        return loss / divisor
    except TYPE_FAILURES as error:
        raise explain(error, linear_distillation, locals()) from None


def _check(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
) -> None:
    for name, x, w in (
        ("student", student, student_weight),
        ("teacher", teacher, teacher_weight),
    ):
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
            raise InputError(
                f"{name}: expected a float tensor (..., features) of at least one feature,"
                f" got {x.dtype} {tuple(x.shape)}"
            )
        if w.dim() != 2 or w.shape[1] != x.shape[-1] or w.shape[0] == 0:
            raise InputError(
                f"{name}_weight: expected shape (V, K), K the last dimension of {name}"
                f" {tuple(x.shape)}, got {tuple(w.shape)}"
            )
        if w.dtype != x.dtype or w.device != x.device:
            raise InputError(
                f"{name}_weight: expected {x.dtype} on {x.device} as {name},"
                f" got {w.dtype} on {w.device}"
            )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise InputError(
            f"teacher_weight: expected the student's vocabulary of {student_weight.shape[0]}"
            f" classes, got {teacher_weight.shape[0]}"
        )
    if teacher.shape[:-1] != student.shape[:-1]:
        raise InputError(
            f"teacher: expected shape {tuple(student.shape[:-1])} (the rows of student) and its"
            f" features, got {tuple(teacher.shape)}"
        )
    if teacher.device != student.device:
        raise InputError(
            f"teacher: expected device {student.device} as student, got {teacher.device}"
        )
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise InputError(
            f"teacher: expected float64 with float64 only, student is {student.dtype},"
            f" got {teacher.dtype}"
        )
    if mask is not None and (mask.shape != student.shape[:-1] or mask.device != student.device):
        raise InputError(
            f"mask: expected shape {tuple(student.shape[:-1])} (the rows of student) on"
            f" {student.device}, got {tuple(mask.shape)} on {mask.device}"
        )


def _check_options(
    kind: str,
    beta: float,
    temperature: float,
    num_items: int | Tensor | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> None:
    if kind not in KINDS:
        raise InputError(f"kind: expected forward, reverse or jsd, got {kind!r}")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise InputError(
            f"beta: expected 0 < beta < 1 with kind 'jsd', got {beta}; KL(teacher || student) is"
            " kind 'forward', KL(student || teacher) is kind 'reverse'"
        )
    if not 0.0 < temperature < math.inf:
        raise InputError(f"temperature: expected > 0, got {temperature}")
    for name, softcap in (
        ("student_softcap", student_softcap),
        ("teacher_softcap", teacher_softcap),
    ):
        if softcap is not None and not softcap > 0:
            raise InputError(f"{name}: expected > 0 or None, got {softcap}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise InputError(f"num_items: expected one number, got shape {tuple(num_items.shape)}")
    elif num_items is not None and not num_items > 0:
        raise InputError(f"num_items: expected > 0, got {num_items}")


def _flops(student, student_weight, teacher, teacher_weight, *options, **_):
    need_student, need_weight = options[-2:]
    student_flops = 2 * math.prod(student) * student_weight[0]
    return (
        2 * math.prod(teacher) * teacher_weight[0]
        + (1 + need_student + need_weight) * student_flops
    )


_backward = declare(reference.linear_distillation_backward, "cpu triton", dispatch_arg="d_student")
_loss = declare(  # the gradients are differentiable: a second derivative is refused, not zero
    reference.linear_distillation_forward,
    "cpu triton",
    outputs="loss d_student d_weight",
    backward=_backward,
    gradients=("student", "student_weight"),
    saves={"weight_dtype": lambda student_weight: student_weight.dtype},
    flops=_flops,
)
