"""Cases of the Triton gate for AdamW; see tests/gates/triton_gate/__main__.py."""

import math

import torch

from fastlm.kernels import adamw as op
from fastlm.reference import AdamWOptions, AdamWTensor
from triton_gate import LOADS, Case, meta


def _step(
    name: str, grad: torch.dtype, *dtypes: torch.dtype, bits=32, master=None, rounds=False, clip=1.0
) -> Case:
    def run(dtype: torch.dtype) -> None:
        shapes = (1024, 4096), (4096,)
        state = torch.uint8 if bits == 8 else torch.float32
        options = AdamWOptions(1e-3, 0.9, 0.999, 1e-8, 0.1, maximize=False, stochastic=rounds)
        tensors = []
        for ordinal, s in enumerate(shapes):
            scale = meta(-(-math.prod(s) // 256)) if bits == 8 else None
            tensors.append(
                AdamWTensor(
                    param=meta(*s, dtype=dtype), grad=meta(*s, dtype=grad), step=meta(),
                    exp_avg=meta(*s, dtype=state), exp_avg_sq=meta(*s, dtype=state),
                    exp_avg_scale=scale, exp_avg_sq_scale=scale,
                    master=None if master is None else meta(*s, dtype=master),
                    options=options, seed=0, ordinal=ordinal,
                )
            )  # fmt: skip
        op.adamw(tensors, clip, meta() if clip else None, False)

    expected = {"_update": LOADS, "_squares": LOADS[:1]}
    return Case(name, run, expected, dtypes)


HALF, WIDE = torch.bfloat16, torch.float32
CASES = [
    _step("float32", WIDE, WIDE),
    _step("16-bit parameters", HALF, HALF),
    _step("masters by halves", HALF, HALF, master=torch.int16, clip=0.0),
    _step("masters of float16", torch.float16, torch.float16, master=WIDE, clip=0.0),
    _step("stochastic rounding", HALF, HALF, rounds=True, clip=0.0),
    _step("8-bit states", WIDE, WIDE, bits=8, clip=0.0),
    _step("8-bit states, masters by halves", HALF, HALF, bits=8, master=torch.int16, clip=0.0),
    _step("8-bit states, stochastic rounding", HALF, HALF, bits=8, rounds=True, clip=0.0),
]
