"""Time layer_norm against F.layer_norm, alone and after an addition; training and decode sizes."""

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, gradients, inference, main

from fastlm import ops

SHAPES = [(4096, 768), (4096, 4096), (512, 768), (252, 507), (1, 768), (8, 2048)]
ODD = [(1, 1), (1, 509), (3, 80), (509, 1021), (4093, 80), (3, 128256)]  # against eager torch only
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def plain(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def plain_residual(x, weight, bias, residual):
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias), h


def fused_residual(x, weight, bias, residual):
    return ops.layer_norm(x, weight, bias, residual=residual)


compiled = torch.compile(plain, dynamic=False)


def of_shape(rows: int, width: int, odd: bool = False, kind: str = "bf16") -> list[Case]:
    dtype = KINDS[kind]

    def operands(*, grad=False):
        shapes = [(rows, width), (width,), (width,)]
        return tuple(torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes)

    def with_residual():
        return *operands(), torch.randn(rows, width).to(dtype)

    def with_gradient():
        return *operands(grad=True), torch.randn(rows, width).to(dtype)

    def variants(run):
        calls = {"fastlm": run(ops.layer_norm), "torch": run(plain)}
        return calls if odd else calls | {"torch.compile": run(compiled)}

    shape, bytes_ = f"{rows} x {width}", rows * width * dtype.itemsize
    residual = {"fastlm": inference(fused_residual), "torch": inference(plain_residual)}
    return [
        Case(f"fwd {kind}", shape, variants(inference), bytes=2 * bytes_, data=operands),
        Case(f"residual fwd {kind}", shape, residual, bytes=4 * bytes_, data=with_residual),
        Case(f"fwd+bwd {kind}", shape, variants(gradients), bytes=5 * bytes_, data=with_gradient),
    ]


def shape_cases(rows: int, width: int) -> list[Case]:
    return [case for kind in KINDS for case in of_shape(rows, width, kind=kind)]


def cases() -> list[Case]:
    odd = [case for shape in ODD for case in of_shape(*shape, odd=True)]
    return [case for shape in SHAPES for case in shape_cases(*shape)] + odd


if __name__ == "__main__":
    main("layer_norm", cases, shape_cases)
