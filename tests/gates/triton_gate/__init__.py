"""Shared by the files of the gate: a case and the instructions that its machine code needs."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

LOADS = ("LDG.E.128", "STG.E.128")
"""128-bit accesses of global memory."""
MATRIX = ("matrix",)
"""The architecture's matrix instruction: HMMA, HGMMA or UTCHMMA (for integers IMMA, IGMMA)."""


class Case(NamedTuple):
    """One configuration of an op.

    `run(dtype)` calls host functions of the op on tensors from `meta`. `expected` has, for each
    kernel, the instructions that its machine code must contain.
    """

    name: str
    run: Callable[[torch.dtype], None]
    expected: Mapping[str, tuple[str, ...]] = {}
    dtypes: tuple[torch.dtype, ...] = FLOATS


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory. Reading its values fails: on a GPU the host would have to wait."""
    return torch.empty(shape, dtype=dtype, device="meta")
