"""Cases of the Triton gate for attention; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import attention
from fastlm.reference import AttentionOptions
from triton_gate import MATRIX, Case, meta

BFLOAT16 = (torch.bfloat16,)  # float16 has the same tiles
FLOAT32 = (torch.float32,)
PRODUCTS = {name: MATRIX for name in ("_forward", "_dq", "_dkdv", "_dbias")} | {
    "_delta": ("LDG.E.128",)
}


def _numbers(causal: bool, width: int, window: int, softcap: float, dropout_p: float):
    return AttentionOptions(causal, width**-0.5, window, softcap, dropout_p)


def _training(name: str, width: int, dtypes: tuple, expected: dict, *, all_options=False) -> Case:
    """Forward and backward of (2, 32/8, 4096, width)."""

    def run(dtype: torch.dtype) -> None:
        q = meta(2, 32, 4096, width, dtype=dtype)
        k, v = (meta(2, 8, 4096, width, dtype=dtype) for _ in range(2))
        if all_options:
            options = (meta(32), meta(32), meta(1, 1, 4096, 4096, dtype=dtype))
            seed = meta(1, dtype=torch.int64)
            numbers = _numbers(True, width, 1024, 30.0, 0.1)
        else:
            options, seed, numbers = (None, None, None), None, _numbers(True, width, 0, 0.0, 0.0)
        out, lse = attention.attention_forward(q, k, v, *options, seed, numbers)
        attention.attention_backward(
            out, None, q, k, v, out, lse, *options, seed, numbers, all_options
        )

    return Case(name, run, expected, dtypes)


def _decoding(width: int) -> Case:
    def run(dtype: torch.dtype) -> None:
        q = meta(1, 32, 1, width, dtype=dtype)
        k, v = (meta(1, 8, 8192, width, dtype=dtype) for _ in range(2))
        numbers = _numbers(True, width, 0, 0.0, 0.0)
        attention.attention_forward(q, k, v, None, None, None, None, numbers)

    expected = {"_forward": (*MATRIX, "LDGSTS"), "_combine": ("LDG.E.128",)}
    return Case(f"decoding {width}", run, expected, BFLOAT16)


# float32 products do not use the matrix instructions, which would round to tf32.
CASES = [
    _training("causal 64", 64, BFLOAT16, PRODUCTS),
    _training("causal 128", 128, BFLOAT16, PRODUCTS),
    _training("causal 256", 256, BFLOAT16, PRODUCTS),
    _training("every option 128", 128, BFLOAT16, PRODUCTS, all_options=True),
    _training("causal 64", 64, FLOAT32, {}),
    _training("causal 256", 256, FLOAT32, {}),
    _training("every option 64", 64, FLOAT32, {}, all_options=True),
    _training("every option 128", 128, FLOAT32, {}, all_options=True),
    _decoding(128),
]
