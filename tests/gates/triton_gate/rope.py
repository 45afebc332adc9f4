"""Cases of the Triton gate for rope; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import rope
from triton_gate import FLOATS, LOADS, Case, meta


def _case(
    batch: int,
    length: int,
    width: int,
    rotary_dim: int,
    interleaved: bool = False,
    inverse: bool = False,
    vectors: bool = True,
    dtypes: tuple = (torch.bfloat16,),
) -> Case:
    def run(dtype: torch.dtype) -> None:
        q = meta(batch, length, 32, width, dtype=dtype).transpose(1, 2)
        k = meta(batch, length, 8, width, dtype=dtype).transpose(1, 2)
        cos, sin = (meta(length, rotary_dim) for _ in range(2))
        rope.rope(q, k, cos, sin, interleaved, inverse)

    flags = f"{'interleaved' if interleaved else ''}{' inverse' if inverse else ''}"
    name = f"{batch} x {length}, {rotary_dim} of {width} {flags}".strip()
    return Case(name, run, {"_rope": LOADS} if vectors else {}, dtypes)


# Training, its backward, decoding (one position), a part of the width, both layouts. 40 pairs are
# not a power of two. 11 pairs and single positions cannot be loaded by 128 bits.
CASES = [
    _case(4, 2048, 128, 128, dtypes=FLOATS),
    _case(4, 2048, 128, 128, inverse=True),
    _case(4, 2048, 128, 128, interleaved=True, dtypes=FLOATS),
    _case(4, 2048, 64, 64),
    _case(4, 2048, 128, 32, interleaved=True),
    _case(4, 2048, 80, 80),
    _case(8, 1, 128, 128, vectors=False),
    _case(2, 100, 66, 22, vectors=False),
]
