"""linear_distillation by csrc/cpu/linear_distillation.h, one chunk of rows at a time.

The products of the gradients are those of linear_cross_entropy (csrc/cpu/linear_cross_entropy.h).
Its kernel multiplies ``on_p * E * e^(base - lse)`` with the weight and the rows, where E are the
exponentials of the scores. Here E is dloss/dz, base and lse are 0, and no row has a target.

Rejected: scores in 16 bits, because no later step removes their error in a difference of
logarithms; one pass over both heads that stores only what the gradient needs, because the terms of
jsd need both sums first.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.cpu.cross_entropy import contiguous_rows
from fastlm.cpu.linear_cross_entropy import CpuLogitChunks, _or_empty
from fastlm.cpu.linear_cross_entropy import linear_cross_entropy_loss_backward as _scale_gradients

# Bytes for a chunk's scores of both heads: 8 per class, or 10 with a separate 16-bit gradient of
# the scores. More where an eighth of the float32 gradient of the weight is more.
_WORKSPACE = 64 << 20
_MAX_CHUNK_ROWS = 512  # per chunk, as in linear_cross_entropy
_NONE = -100  # the target of every row


class _Workspace:
    """The scores of a chunk, their sums and the workspace of the kernels."""

    def __init__(self, rows: int, classes: int, width: int):
        *self.shape, floats = _cpu.linear_distillation_workspace(classes, width, rows)
        self.rows, self.workspace = rows, self.floats(floats)
        self.lse = [self.floats(2, rows) for _ in range(2)]

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="cpu")


def linear_distillation_forward(
    student,
    student_weight,
    teacher,
    teacher_weight,
    keep,
    kind,
    beta,
    logit_scale,
    student_softcap,
    teacher_softcap,
    unit,
    need_student,
    need_weight,
):
    if keep is not None and not keep.all():  # in fine-tuning most rows of a batch are masked
        rows = keep.nonzero()[:, 0]
        total, d_student, d_weight = linear_distillation_forward(
            student[rows],
            student_weight,
            teacher[rows],
            teacher_weight,
            None,
            kind,
            beta,
            logit_scale,
            student_softcap,
            teacher_softcap,
            unit,
            need_student,
            need_weight,
        )
        if need_student:
            d_student = student.new_zeros(student.shape).index_copy_(0, rows, d_student)
        return total, d_student, d_weight
    n, classes, need = len(student), len(student_weight), need_student or need_weight
    target = torch.full((n,), _NONE, device="cpu")
    chunks = CpuLogitChunks(
        student, student_weight, None, target, None, False, _NONE, None, logit_scale
    )
    chunks.shift.zero_()
    chunks.log_sum.zero_()
    in_place = not need or _cpu.matrix_element_bytes(student) == 4
    step = _cpu.CHUNK_ROW_STEP
    padded = _cpu.linear_distillation_workspace(classes, student.shape[1], step)[0]
    row_bytes = padded * (8 if in_place else 10)
    budget = max(_WORKSPACE, student_weight.numel() * 4 // 8 if need_weight else 0)
    chunks.rows = min(_MAX_CHUNK_ROWS, max(budget // row_bytes // step * step, step))
    heads = (
        (chunks.input, chunks.weight),
        (contiguous_rows(teacher), contiguous_rows(teacher_weight)),
    )
    # a softcap before the scale is softcap * scale after it
    caps = [(cap or 0.0) * logit_scale for cap in (student_softcap, teacher_softcap)]
    on_row, zeros = (
        torch.full((n,), value, dtype=torch.float32, device="cpu") for value in (unit, 0.0)
    )
    losses = torch.empty(n, dtype=torch.float32, device="cpu")
    d_student, d_weight, _ = chunks.outputs(None, need_student, need_weight)
    workspace, d_scores, scores = None, None, []
    for part in chunks:
        rows = part.stop - part.start
        if workspace is None or workspace.rows != rows:
            del workspace, d_scores, scores  # before the next are allocated
            workspace = _Workspace(rows, classes, max(student.shape[1], teacher.shape[1]))
            d_scores, student_scores = None, None
            if need:
                memory, stats, _ = chunks.workspace(part)
                stats[: workspace.shape[1]] = 0  # the base of each row
                d_scores = memory.view(torch.float32 if in_place else torch.bfloat16)
                student_scores = d_scores if in_place else None
            scores = [
                workspace.floats(*workspace.shape) if student_scores is None else student_scores,
                workspace.floats(*workspace.shape),
            ]
        for (x, w), cap, z, lse in zip(heads, caps, scores, workspace.lse):
            _cpu.linear_distillation_scores(
                x[part], w, cap, logit_scale, z, lse, workspace.workspace
            )
        _cpu.linear_distillation_rows(
            kind,
            beta,
            caps[0],
            classes,
            scores[0],
            workspace.lse[0],
            scores[1],
            workspace.lse[1],
            losses[part],
            d_scores,
            workspace.workspace,
        )
        if need:
            chunks.gradients(part, on_row[part], zeros[part], None, True, d_student, d_weight, None)
    return (
        losses.sum() * unit,
        _or_empty(d_student, student.dtype),
        _or_empty(d_weight, torch.float32),
    )


def linear_distillation_backward(d_loss, d_student, d_weight, weight_dtype):
    none = d_student.new_empty(0)
    return _scale_gradients(d_loss, d_student, d_weight, none, weight_dtype, none.dtype)[:2]
