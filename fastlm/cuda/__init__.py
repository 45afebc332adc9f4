"""Host side of the CUDA C++ kernels (csrc/cuda), one file per op.

It allocates results and launches kernels by ``fastlm._cuda``, or by ``fastlm._simt`` (csrc/simt)
where ``FASTLM_BACKEND=simt`` forces the emulator.
"""

import functools
import importlib
from typing import Any

import torch

from fastlm import backend


def extension() -> Any:
    """Return the module that launches kernels."""
    return importlib.import_module(
        f"fastlm._{'simt' if backend.forced_backend() == 'simt' else 'cuda'}"
    )


@functools.cache
def constants() -> Any:
    """Return an extension, for the constants of csrc/cuda/ops.h: they are the same in both."""
    return extension()


def stream(tensor: torch.Tensor) -> int:
    """Return the current CUDA stream of the tensor's device; 0 on the emulator."""
    if not tensor.is_cuda:
        return 0
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)  # pyright: ignore[reportAttributeAccessIssue]


emulated_multiprocessors = 4
"""Multiprocessors of the emulator's device: few, so that work is divided at small sizes."""


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors among which host functions divide work."""
    return _multiprocessors(device) if device.type == "cuda" else emulated_multiprocessors


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
