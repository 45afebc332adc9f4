"""cross_entropy on logits against eager torch and torch.compile: forward, and with gradients."""

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, forward, gradients, main

from fastlm import ops

# rows, classes, dtype; odd ones are compared with eager torch only
SHAPES = [
    (4096, 32768, torch.float32),
    (4096, 32768, torch.bfloat16),
    (252, 50257, torch.bfloat16),
    (64, 128256, torch.float32),
]
ODD = [
    (rows, classes, dtype)
    for rows, classes in [(1, 50257), (1, 128256), (127, 50257), (67, 128256), (4093, 509), (1, 3)]
    for dtype in (torch.float32, torch.bfloat16)
]
compiled = torch.compile(F.cross_entropy, dynamic=False)


def of_shape(rows: int, classes: int, dtype: torch.dtype, odd: bool = False) -> list[Case]:
    def operands():
        logits = torch.randn(rows, classes).to(dtype).requires_grad_()
        return logits, torch.randint(0, classes, (rows,))

    def with_gradient():
        return *operands(), None  # a loss has no upstream gradient here

    case_list = []
    # the forward reads the logits; the backward reads them again and writes as many bytes
    for label, run, passes, data in (
        ("fwd", forward, 1, operands),
        ("fwd+bwd", gradients, 3, with_gradient),
    ):
        variants = {"fastlm": run(ops.cross_entropy), "torch": run(F.cross_entropy)}
        if not odd:
            variants["torch.compile"] = run(compiled)
        name = f"cross_entropy {label} {str(dtype).removeprefix('torch.')}"
        size = rows * classes * dtype.itemsize
        case_list.append(
            Case(name, f"{rows} x {classes}", variants, bytes=passes * size, data=data)
        )
    return case_list


def soft(rows: int, classes: int, dtype: torch.dtype) -> Case:
    """Soft targets: the probability of every class."""

    def operands():
        logits = torch.randn(rows, classes).to(dtype).requires_grad_()
        return logits, torch.randn(rows, classes).softmax(-1).to(dtype), None

    return Case(
        f"cross_entropy soft targets fwd+bwd {str(dtype).removeprefix('torch.')}",
        f"{rows} x {classes}",
        {"fastlm": gradients(ops.cross_entropy), "torch": gradients(F.cross_entropy)},
        data=operands,
    )


SOFT = [
    (512, 32000, torch.float32),
    (512, 32000, torch.bfloat16),
    (4096, 1000, torch.float32),
    (4, 50257, torch.float32),
]


def shape_cases(rows: int, classes: int) -> list[Case]:
    return [c for d in (torch.bfloat16, torch.float32) for c in of_shape(rows, classes, d)]


def cases() -> list[Case]:
    hard = [c for shape in SHAPES + ODD for c in of_shape(*shape, shape in ODD)]
    return hard + [soft(*shape) for shape in SOFT]


if __name__ == "__main__":
    main("cross_entropy", cases, shape_cases)
