"""Cases of the Triton gate for quantized_linear; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import quantized_linear as op
from triton_gate import HALVES, MATRIX, Case, meta

N = K = 4096
LOAD, STORE = ("LDG.E.128",), ("STG.E.128",)


def _weight(bits: int, group_size: int, zeros: bool, n: int = N, k: int = K) -> tuple:
    row_bytes = -(-k * bits // 8)
    stored = meta(n, row_bytes, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = meta(n, -(-k // group_size), dtype=torch.bfloat16)
    return stored, scales, scales if zeros else None


def _forward(
    rows: int, bits: int, act_bits: int, *, group_size=128, zeros=False, dtypes=HALVES[:1]
) -> Case:
    def run(dtype: torch.dtype) -> None:
        bias = meta(N, dtype=dtype) if zeros else None
        weight = _weight(bits, group_size, zeros)
        op.quantized_linear_forward(
            meta(rows, K, dtype=dtype), *weight, bias, bits, group_size, act_bits
        )

    matrix = () if dtypes == (torch.float32,) else MATRIX
    expected = {"_vector": LOAD, "_matrix": matrix, "_integers": MATRIX, "_dequantize": STORE}
    name = f"{rows} rows, w{bits}a{act_bits}, groups of {group_size}{', zeros' * zeros}"
    return Case(name, run, expected, dtypes)


def _with_size_one(rows: int, n: int, k: int, act_bits: int) -> Case:
    """Sizes of 1 are constants for Triton. Arithmetic on them must compile, too."""

    def run(dtype: torch.dtype) -> None:
        weight = _weight(4, 128, True, n, k)
        x, bias = meta(rows, k, dtype=dtype), meta(n, dtype=dtype)
        op.quantized_linear_forward(x, *weight, bias, 4, 128, act_bits)

    return Case(f"{rows} x {k} -> {n}, w4a{act_bits}", run, {}, HALVES[:1])


def _backward(bits: int) -> Case:
    def run(dtype: torch.dtype) -> None:
        op.quantized_linear_backward(
            meta(64, N, dtype=dtype), *_weight(bits, 128, True), bits, 128, K
        )

    return Case(f"backward, w{bits}", run, {"_dequantize": STORE}, HALVES[:1])


CASES = [
    *(_forward(rows, 4, 16) for rows in (1, 4, 16, 32, 64, 512)),
    _forward(16, 4, 16, group_size=32, zeros=True, dtypes=HALVES[1:]),
    *(_forward(rows, 4, 16, dtypes=(torch.float32,)) for rows in (16, 64)),
    *(_forward(rows, 8, 16, zeros=True) for rows in (1, 512)),
    *(_forward(rows, 4, 8) for rows in (1, 16)),
    *(_forward(rows, 8, 8) for rows in (16, 512)),
    _forward(512, 4, 8, group_size=32, zeros=True),
    *(_with_size_one(rows, 1, 4096, act_bits) for rows in (1, 16) for act_bits in (16, 8)),
    *(_with_size_one(rows, 4096, 1, act_bits) for rows in (1, 16) for act_bits in (16, 8)),
    _with_size_one(1, 1, 1, 16),
    _backward(4),
    _backward(8),
]
