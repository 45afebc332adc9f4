"""Cases of the Triton gate for rms_norm; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import rms_norm
from triton_gate import FLOATS, HALVES, LOADS, Case, meta


def _case(
    rows: int, width: int, residual: bool, vectors: bool, dtypes: tuple = (torch.bfloat16,)
) -> Case:
    def run(dtype: torch.dtype) -> None:
        x, dy = (meta(rows, width, dtype=dtype) for _ in range(2))
        other = meta(rows, width, dtype=dtype) if residual else None
        weight, rstd = meta(width, dtype=dtype), meta(rows)
        rms_norm.rms_norm_forward(x, other, weight, 1e-6, 0.0)
        rms_norm.rms_norm_backward(dy, other, x, weight, rstd, 0.0)

    kernels = ("_forward", "_backward", "_forward_wide", "_backward_wide")
    expected = dict.fromkeys(kernels, LOADS) if vectors else {}
    return Case(f"{rows} x {width} {'residual' if residual else ''}", run, expected, dtypes)


# Widths that are powers of two and others, a query's head (narrow), one row, rows that take several
# blocks. An odd width cannot be loaded by 128 bits.
CASES = [
    _case(4096, 4096, True, True, FLOATS),
    _case(4096, 8192, True, True, FLOATS),
    _case(4096, 5120, False, True),
    _case(4096, 576, False, True, HALVES),
    _case(65536, 128, False, True),
    _case(1, 4096, True, True),
    _case(4096, 16384, True, True, FLOATS),
    _case(64, 507, True, False),
]
