"""Cases of the Triton gate for varlen_attention; see tests/gates/triton_gate/__main__.py.

The kernels are attention's. One width is enough to show that the search for a sequence causes no
spill.
"""

import torch

from fastlm.kernels import varlen_attention
from fastlm.reference import AttentionOptions
from triton_gate import MATRIX, Case, meta


def _run(dtype: torch.dtype) -> None:
    q = meta(8192, 32, 128, dtype=dtype)
    k, v = (meta(8192, 8, 128, dtype=dtype) for _ in range(2))
    cu = meta(9, dtype=torch.int32)
    options, numbers = (None,) * 4, (8192, 8192, AttentionOptions(True, 128**-0.5))
    out, lse = varlen_attention.varlen_attention_forward(q, k, v, cu, cu, *options, *numbers)
    varlen_attention.varlen_attention_backward(
        out, None, q, k, v, out, lse, cu, cu, *options, *numbers, False
    )


CASES = [
    Case("causal 128", _run, {n: MATRIX for n in ("_forward", "_dq", "_dkdv")}, (torch.bfloat16,))
]
