"""AdamW by csrc/cpu/adamw.cpp. This file allocates the workspace for the tables that C++ builds."""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.errors import InputError
from fastlm.reference import AdamWTensor


def adamw(
    tensors: list[AdamWTensor], max_grad_norm: float, grad_norm: Tensor | None, have_norm: bool
) -> None:
    """Run `reference.adamw`, in place. Everything is checked before anything is written."""
    size = _cpu.adamw_workspace([t.param.numel() for t in tensors])
    workspace = torch.empty(size, dtype=torch.int64, device="cpu")
    try:
        _cpu.adamw(tensors, max_grad_norm, grad_norm, have_norm, workspace)
    except ValueError as error:
        raise InputError(str(error)) from None
