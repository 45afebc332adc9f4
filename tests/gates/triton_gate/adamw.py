"""What the gate compiles of AdamW; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import adamw as op
from triton_gate import LOADS, Case, meta


def _step(
    name: str, grad: torch.dtype, *dtypes: torch.dtype, bits=32, master=None, rounds=False, clip=1.0
) -> Case:
    def run(dtype: torch.dtype) -> None:
        shapes = (1024, 4096), (4096,)
        params, grads, m, v = (
            [meta(*s, dtype=d) for s in shapes]
            for d in (dtype, grad, *[torch.uint8 if bits == 8 else torch.float32] * 2)
        )
        scales = [meta(-(-p.numel() // 256)) if bits == 8 else None for p in params]
        masters = [None if master is None else meta(*p.shape, dtype=master) for p in params]
        steps = [meta() for _ in params]
        options = [(1e-3, 0.9, 0.999, 1e-8, 0.1, False, rounds)] * 2
        norm = meta() if clip else None
        op.adamw(
            params, grads, steps, m, v, scales, scales, masters, options, [(0, 0), (0, 1)],
            clip, norm, False,
        )  # fmt: skip

    wanted = {"_update": LOADS, "_squares": LOADS[:1]}
    return Case(name, run, wanted, dtypes)


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
