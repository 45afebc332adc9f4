"""Shared by the files of the gate: a case, and what its machine code must contain."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

LOADS = ("LDG.E.128", "STG.E.128")
"""128-bit accesses of global memory."""
MATRIX = ("matrix",)
"""The architecture's own matrix instruction: HMMA, HGMMA or UTCHMMA (of integers IMMA, IGMMA)."""


class Case(NamedTuple):
    """`run(dtype)` calls host functions of one op on tensors from `meta`. `expected`: for each
    kernel the instructions that its machine code must contain."""

    name: str
    run: Callable[[torch.dtype], None]
    expected: Mapping[str, tuple[str, ...]] = {}
    dtypes: tuple[torch.dtype, ...] = FLOATS


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory. Reading its values fails, because on a GPU it would have to wait."""
    return torch.empty(shape, dtype=dtype, device="meta")
