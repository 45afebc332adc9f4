"""rms_norm against F.rms_norm, alone and after a residual addition; training and decode sizes."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

SHAPES = [(4096, 512), (4096, 4096), (252, 507), (1, 576), (1, 4096), (8, 2048)]
ODD = [(1, 1), (1, 509), (3, 80), (509, 1021), (4093, 80), (3, 128256)]  # against eager torch alone


def plain(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def plain_residual(x, weight, residual):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, 1e-6), h


def fused_residual(x, weight, residual):
    return ops.rms_norm(x, weight, residual=residual)


def cases() -> list[Case]:
    made = []
    for rows, width in SHAPES + ODD:
        x, residual, dy = torch.randn(3, rows, width).bfloat16().unbind(0)
        weight = torch.randn(width).bfloat16()
        n = rows * width
        compiled = torch.compile(plain, dynamic=False)

        def forward(f, x=x, weight=weight):
            with torch.inference_mode():
                return f(x, weight)

        def with_residual(f, x=x, weight=weight, residual=residual):
            with torch.inference_mode():
                return f(x, weight, residual)

        def both(f, x=x, weight=weight, dy=dy):
            a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(f(a, w), (a, w), dy)

        shape = f"{rows} x {width}"
        variants = {
            "fastlm": lambda f=forward: f(ops.rms_norm),
            "torch": lambda f=forward: f(plain),
        }
        odd = (rows, width) in ODD
        if not odd:
            variants["torch.compile"] = lambda f=forward, c=compiled: f(c)
        made.append(Case("fwd", shape, variants, bytes=4 * n))
        variants = {
            "fastlm": lambda f=with_residual: f(fused_residual),
            "torch": lambda f=with_residual: f(plain_residual),
        }
        made.append(Case("residual fwd", shape, variants, bytes=8 * n))
        if rows > 8 or odd:
            variants = {
                "fastlm": lambda f=both: f(ops.rms_norm),
                "torch": lambda f=both: f(plain),
            }
            if not odd:
                variants["torch.compile"] = lambda f=both, c=compiled: f(c)
            made.append(Case("fwd+bwd", shape, variants, bytes=10 * n))
    return made


if __name__ == "__main__":
    main("rms_norm", cases)
