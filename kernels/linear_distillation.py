"""Divergence of two heads' softmaxes in chunks of rows.

cuBLAS computes the matrix products, `cross_entropy`'s forward kernel the sums of both softmaxes,
and a kernel of this file the losses and the gradients of the logits.

    per chunk of rows:   z, z_t   = x[chunk] W^T, and the teacher's   float32, (chunk, V)
                         lse      = forward(z), forward(z_t)          reads each once
                         loss, dz = rows(z, z_t, lse)                 reads both twice, writes x's
                                                                      dtype
                         d_student[chunk] = dz W
                         d_weight        += dz^T x[chunk]             summed in float32 in memory

Everything else is as in `linear_cross_entropy`: float32 logits, chunks of a quarter of the rows or
as many as fit `_WORKSPACE`, a host that never waits for the GPU. Masked rows are therefore computed
and not used: their gradient is 0, and so is their x in the product of d_weight, because 0 * NaN
would be NaN. A chunk takes 10 bytes per class and row. For float32 it takes 8, because the gradient
overwrites the student's logits.

One program handles one row, because the gradient of reverse and jsd needs a sum over the row.
With the log-ratio d of the probabilities, m / s and m / t are 1 + beta (e^d - 1) and
1 + (1 - beta) (e^-d - 1); the exponential that is at most 1 is used. Nothing was measured on a GPU.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.cross_entropy import row_outputs, row_statistics
from fastlm.kernels.launch import Config, launch

_TILE = 128  # rows of a product's tile
_WORKSPACE = 1 << 30  # bytes: 800 rows of 128 thousand classes
_BLOCK = 2048  # classes: 8 per thread, of both heads
_NONE = -100  # the target of every row


@triton.jit
def _log_probability(logits, at, mask, scale, cap, shift, log_sum, CAPPED: tl.constexpr):
    """Return log softmax of some classes of a row, and dz / d(scale * logit)."""
    z = tl.load(logits + at, mask=mask, other=0.0) * scale
    slope = 1.0
    if CAPPED:
        t = 1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0)
        z = cap * t
        slope = 1.0 - t * t
    return tl.where(mask, z - shift - log_sum, float("-inf")), slope


@triton.jit
def _times(p, log):
    """Return p * log. A probability of 0 contributes 0, also where the logarithm is infinite."""
    return tl.where(p == 0.0, 0.0, p * log)


@triton.jit
def _terms(log_s, log_t, beta, KIND: tl.constexpr):
    """Return s, t, log(s / other) and log(t / other): other is t or s, or for "jsd" their
    mixture."""
    d = log_t - log_s
    s = tl.exp(log_s)
    t = tl.exp(log_t)
    if KIND == "jsd":
        share = tl.where(d > 0.0, 1.0 - beta, beta)
        g = tl.log(1.0 + share * (tl.exp(-tl.abs(d)) - 1.0))
        of_s = -(tl.maximum(d, 0.0) + g)
        of_t = tl.minimum(d, 0.0) - g
    else:
        of_s = -d
        of_t = d
    return s, t, of_s, of_t


@triton.jit
def _rows(
    keep,  # (rows,) uint8, or any tensor if not MASKED
    student,  # (rows, classes) float32, contiguous
    teacher,  # (rows, classes) float32, contiguous
    shift,  # (rows,) float32: the log of the student's sum, in two parts
    log_sum,  # (rows,) float32
    shift_t,  # (rows,) float32: the teacher's
    log_sum_t,  # (rows,) float32
    loss,  # (rows,) float32
    dz,  # (rows, classes), contiguous; may be student
    classes,
    scale,
    cap,
    cap_t,
    beta,
    unit,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    CAPPED_T: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * classes
    teacher += row * classes
    dz += row * classes
    end = classes  # 0 for a masked row, of which nothing is read
    if MASKED:
        end = tl.where(tl.load(keep + row) != 0, classes, 0)
    a, b = tl.load(shift + row), tl.load(log_sum + row)
    c, d = tl.load(shift_t + row), tl.load(log_sum_t + row)
    of_student = tl.zeros([BLOCK], tl.float32)
    of_teacher = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        read = at < end
        log_s, _ = _log_probability(student, at, read, scale, cap, a, b, CAPPED)
        log_t, _ = _log_probability(teacher, at, read, scale, cap_t, c, d, CAPPED_T)
        s, t, of_s, of_t = _terms(log_s, log_t, beta, KIND)
        of_student += _times(s, of_s)
        of_teacher += _times(t, of_t)
    mean = tl.sum(of_student, 0)
    if KIND == "forward":
        total = tl.sum(of_teacher, 0)
    elif KIND == "reverse":
        total = mean
    else:
        total = beta * tl.sum(of_teacher, 0) + (1.0 - beta) * mean
    tl.store(loss + row, total * unit)
    if GRADIENT:
        factor = scale * unit
        if KIND == "jsd":
            factor *= 1.0 - beta
        for start in range(0, classes, BLOCK):
            at = start + tl.arange(0, BLOCK)
            read = at < end
            log_s, slope = _log_probability(student, at, read, scale, cap, a, b, CAPPED)
            log_t, _ = _log_probability(teacher, at, read, scale, cap_t, c, d, CAPPED_T)
            s, t, of_s, _ = _terms(log_s, log_t, beta, KIND)
            if KIND == "forward":
                g = s - t
            else:
                g = _times(s, of_s - mean)
            g = tl.where(read, g * slope * factor, 0.0)
            tl.store(dz + at, g.to(dz.dtype.element_ty), mask=at < classes)


def _chunk_rows(rows: int, classes: int, itemsize: int) -> int:
    bytes_per_row = classes * (8 if itemsize == 4 else 8 + itemsize)
    max_rows = min(rows // 4, _WORKSPACE // bytes_per_row)
    return max(1, min(rows, max(_TILE, max_rows // _TILE * _TILE)))


def _multiply(x: Tensor, w: Tensor, out: Tensor) -> None:
    """Compute out = x w^T in float32."""
    if x.dtype == torch.float32:
        torch.mm(x, w.t(), out=out)
    elif x.device.type == "cpu":
        out.copy_(F.linear(x.float(), w.float()))
    else:
        torch.mm(x, w.t(), out_dtype=torch.float32, out=out)


def _add_product(d_weight: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """Compute d_weight (+)= dz^T x in float32."""
    if x.device.type == "cpu":  # torch's 16-bit products have 16-bit results there
        dz, x = dz.float(), x.float()
    mixed = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}
    if first:
        torch.mm(dz.t(), x, **mixed, out=d_weight)
    else:
        torch.addmm(d_weight, dz.t(), x, **mixed, out=d_weight)


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
    n, classes = len(student), len(student_weight)
    make = {"dtype": torch.float32, "device": student.device}
    chunk = _chunk_rows(n, classes, student.element_size())
    z, z_t = (torch.empty(chunk, classes, **make) for _ in range(2))
    need = need_student or need_weight
    dz = z  # in place, element by element
    if need and student.dtype != torch.float32:
        dz = torch.empty(z.shape, dtype=student.dtype, device=student.device)
    d_student = student.new_empty(student.shape if need_student else 0)
    d_weight = torch.empty(student_weight.shape if need_weight else 0, **make)
    if not n:
        d_weight.zero_()
    losses = torch.empty(n, **make)
    target = torch.full((chunk,), _NONE, device=student.device)
    keep = None if keep is None else keep.contiguous().view(torch.uint8)
    heads = (
        (student, student_weight, z, student_softcap),
        (teacher, teacher_weight, z_t, teacher_softcap),
    )
    # a softcap before the scale is softcap * scale after it
    caps = [(cap or 1.0) * logit_scale for *_, cap in heads]
    config = Config({"BLOCK": min(_BLOCK, triton.next_power_of_2(classes))}, num_warps=8)
    for i in range(0, n, chunk):
        part = slice(i, min(i + chunk, n))
        rows = part.stop - i
        sums = []
        for (x, w, logits, softcap), cap in zip(heads, caps):
            _multiply(x[part], w, logits[:rows])
            outputs = row_outputs(target[:rows], False)
            row_statistics(
                logits[:rows], None, target[:rows], None, False, _NONE,
                None if softcap is None else cap, logit_scale, outputs,
            )  # fmt: skip
            sums += outputs[:2]
        launch(
            _rows, (rows,), losses if keep is None else keep[part], z, z_t, *sums, losses[part], dz,
            classes, logit_scale, *caps, beta, unit, config=config, KIND=kind,
            MASKED=keep is not None, CAPPED=student_softcap is not None,
            CAPPED_T=teacher_softcap is not None, GRADIENT=need,
        )  # fmt: skip
        if need_student:
            torch.mm(dz[:rows], student_weight, out=d_student[part])
        if need_weight:
            x = student[part]
            if keep is not None:
                x = x.masked_fill(keep[part, None] == 0, 0)
            _add_product(d_weight, dz[:rows], x, i == 0)
    return losses.sum(), d_student, d_weight


def linear_distillation_backward(
    d_loss: Tensor, d_student: Tensor, d_weight: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale the gradients by d_loss. The float32 product is rounded once, as torch does."""
    scaled = torch.empty_like(d_weight, dtype=weight_dtype)
    torch.mul(d_weight, d_loss, out=scaled)
    return torch.mul(d_student, d_loss, out=torch.empty_like(d_student)), scaled
