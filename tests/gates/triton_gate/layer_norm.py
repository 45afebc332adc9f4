"""Cases of the Triton gate for layer_norm; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import layer_norm
from triton_gate import LOADS, Case, meta

BOTH = (torch.float32, torch.bfloat16)


def _case(
    rows: int, width: int, residual: bool, vectors: bool, dtypes: tuple = (torch.bfloat16,)
) -> Case:
    def run(dtype: torch.dtype) -> None:
        x, dy = (meta(rows, width, dtype=dtype) for _ in range(2))
        other = meta(rows, width, dtype=dtype) if residual else None
        weight, bias = (meta(width, dtype=dtype) for _ in range(2))
        mean, rstd = (meta(rows) for _ in range(2))
        layer_norm.layer_norm_forward(x, other, weight, bias, 1e-5)
        layer_norm.layer_norm_backward(dy, other, x, weight, mean, rstd, True, True)

    kernels = ("_forward", "_backward", "_forward_wide", "_backward_wide")
    expected = dict.fromkeys(kernels, LOADS) if vectors else {}
    return Case(f"{rows} x {width} {'residual' if residual else ''}", run, expected, dtypes)


# Widths that are powers of two and others, GPT-2's width, one row, rows that take several blocks.
# An odd width cannot be loaded by 128 bits.
CASES = [
    _case(4096, 4096, True, True, BOTH),
    _case(4096, 8192, True, True, BOTH),
    _case(4096, 5120, False, True),
    _case(4096, 768, False, True, (torch.float16,)),
    _case(1, 4096, True, True),
    _case(4096, 16384, True, True, BOTH),
    _case(64, 507, True, False),
]
