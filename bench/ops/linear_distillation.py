"""Time linear_distillation against the formula on the logits of both heads, eager and compiled.

Measured are the loss with the gradients of student and student_weight, and the loss alone.
"linear_cross_entropy" is not a peer but the yardstick: 3 products with gradients where distillation
takes 4, 1 without where it takes 2.

TRL's loss of GKD is the eager formula. Liger's LigerFusedLinearJSD is a Triton kernel and does not
run on a CPU.
"""

import math

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, forward, gradients, main, short, torch_variants

from fastlm import ops

BF16, FP32 = torch.bfloat16, torch.float32
# kind, rows, width of student and teacher, classes, dtype
SHAPES = [
    ("forward", 1024, 576, 49152, BF16),
    ("reverse", 1024, 576, 49152, FP32),
    ("jsd", 1024, 576, 49152, FP32),
]
BETA = 0.5


def log_probabilities(x, w):
    return F.linear(x, w).float().log_softmax(-1)


def naive(kind: str):
    def loss(student, student_weight, teacher, teacher_weight):
        log_s = log_probabilities(student, student_weight)
        with torch.no_grad():
            log_t = log_probabilities(teacher, teacher_weight)
        if kind == "forward":
            return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
        if kind == "reverse":
            return F.kl_div(log_t, log_s, log_target=True, reduction="batchmean")
        log_m = torch.logaddexp(log_t + math.log(BETA), log_s + math.log1p(-BETA))
        of_t, of_s = (
            F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
            for log_p in (log_t, log_s)
        )
        return BETA * of_t + (1 - BETA) * of_s

    return loss


def yardstick(student, student_weight, teacher, teacher_weight):
    target = torch.zeros(len(student), dtype=torch.int64)
    return ops.linear_cross_entropy(student, student_weight, target)


def operands(rows: int, width: int, classes: int, dtype: torch.dtype):
    for needed in (True, False):
        yield torch.randn(rows, width).to(dtype).requires_grad_(needed)
        yield (torch.randn(classes, width) * 2 / width**0.5).to(dtype).requires_grad_(needed)


def of_shape(
    kind: str, rows: int, width: int, classes: int, dtype: torch.dtype, loss_only: bool
) -> Case:
    run, plain = forward if loss_only else gradients, naive(kind)

    def kernel_loss(student, student_weight, teacher, teacher_weight):
        return ops.linear_distillation(
            student, student_weight, teacher, teacher_weight, kind=kind, beta=BETA
        )

    variants = {"fastlm": run(kernel_loss), "fastlm (linear_cross_entropy)": run(yardstick)}
    variants |= torch_variants(run, plain, dtype, torch.compile(plain, dynamic=False))
    return Case(
        f"linear_distillation {kind} {'fwd' if loss_only else 'fwd+bwd'}"
        f" {str(dtype).removeprefix('torch.')}",
        f"{rows} x {width} -> {classes}",
        variants,
        flops=(2 if loss_only else 4) * 2 * rows * width * classes,
        dtype=short(dtype),
        data=lambda: (
            *operands(rows, width, classes, dtype),
            *([] if loss_only else [None]),
        ),
    )


def shape_cases(rows: int, width: int, classes: int) -> list[Case]:
    return [
        of_shape(kind, rows, width, classes, FP32, loss_only)
        for kind in ("forward", "jsd")
        for loss_only in (True, False)
    ]


def cases() -> list[Case]:
    return [of_shape(*shape, loss_only) for shape in SHAPES for loss_only in (True, False)]


if __name__ == "__main__":
    main("linear_distillation", cases, shape_cases)
