"""AdamW through csrc/cpu/adamw.h. Allocates the workspace in which C++ builds its table of tensors
and chunks, and gives each tensor its key for stochastic rounding.
"""

from typing import Any

import torch

from fastlm import reference
from fastlm.backend import cpu_extension as _cpu
from fastlm.errors import InputError

# csrc/cpu/adamw_table.h: elements per chunk, int64 of workspace per tensor and per chunk
_CHUNK, _TENSOR_INTS, _CHUNK_INTS = 32768, 20, 4


def adamw(*arguments: Any) -> None:
    """`reference.adamw`, in place."""
    params, steps, options, keys = (arguments[i] for i in (0, 2, 8, 9))
    if any(row[-1] for row in options):
        keys = [reference.step_key(*key, int(step)) for key, step in zip(keys, steps)]
    else:
        keys = [0] * len(params)
    chunks = sum([-(-param.numel() // _CHUNK) for param in params])
    workspace = torch.empty(
        len(params) * _TENSOR_INTS + chunks * _CHUNK_INTS, dtype=torch.int64, device="cpu"
    )
    try:
        _cpu.adamw(*arguments[:9], keys, *arguments[10:], workspace)
    except ValueError as error:
        raise InputError(str(error)) from None
