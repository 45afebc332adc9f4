"""Time rms_norm against F.rms_norm, alone and after a residual addition; training, decode sizes."""

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, gradients, inference, main

from fastlm import ops

SHAPES = [(4096, 512), (4096, 4096), (252, 507), (1, 576), (1, 4096), (8, 2048)]
ODD = [(1, 1), (1, 509), (3, 80), (509, 1021), (4093, 80), (3, 128256)]  # against eager torch only


def plain(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def plain_residual(x, weight, residual):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, 1e-6), h


def fused_residual(x, weight, residual):
    return ops.rms_norm(x, weight, residual=residual)


compiled = torch.compile(plain, dynamic=False)


def of_shape(rows: int, width: int, odd: bool = False) -> list[Case]:
    def operands(*, grad=False):
        x = torch.randn(rows, width).bfloat16().requires_grad_(grad)
        return x, torch.randn(width).bfloat16().requires_grad_(grad)

    def with_residual():
        return *operands(), torch.randn(rows, width).bfloat16()

    def with_gradient():
        return *operands(grad=True), torch.randn(rows, width).bfloat16()

    def variants(run):
        calls = {"fastlm": run(ops.rms_norm), "torch": run(plain)}
        return calls if odd else calls | {"torch.compile": run(compiled)}

    shape, n = f"{rows} x {width}", rows * width
    residual = {"fastlm": inference(fused_residual), "torch": inference(plain_residual)}
    case_list = [
        Case("fwd", shape, variants(inference), bytes=4 * n, data=operands),
        Case("residual fwd", shape, residual, bytes=8 * n, data=with_residual),
    ]
    if rows > 8 or odd:
        both = variants(gradients)
        case_list.append(Case("fwd+bwd", shape, both, bytes=10 * n, data=with_gradient))
    return case_list


def shape_cases(rows: int, width: int) -> list[Case]:
    return of_shape(rows, width)


def cases() -> list[Case]:
    return [c for shape in SHAPES + ODD for c in of_shape(*shape, shape in ODD)]


if __name__ == "__main__":
    main("rms_norm", cases, shape_cases)
