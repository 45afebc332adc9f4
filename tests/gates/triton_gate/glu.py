"""Cases of the Triton gate for glu; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import glu
from triton_gate import LOADS, Case, meta


def _case(act: str, shape: tuple[int, ...], vectors: bool) -> Case:
    def run(dtype: torch.dtype) -> None:
        gate, up, dy = (meta(*shape, dtype=dtype) for _ in range(3))
        glu.glu_forward(gate, up, act)
        glu.glu_backward(dy, gate, up, act)

    expected = {"_forward": LOADS, "_backward": LOADS} if vectors else {}
    return Case(f"{act} {shape}", run, expected)


# An odd number of elements cannot be loaded by 128 bits.
CASES = [
    *(_case(act, (4096, 2816), True) for act in glu.ACTS),
    _case("silu", (1, 509), False),
]
