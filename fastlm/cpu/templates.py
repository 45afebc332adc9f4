"""Tensors whose `new_empty` and `empty_like` allocate results: 0.1 to 0.3 us per call less than
``torch.empty`` with a dtype and a device.

They are created at first use. One created at import would belong to the mode or transform that is
active there: a fake tensor, without memory, where `fastlm.ops` is imported under FakeTensorMode.
Kernels run on plain tensors only, below modes and transforms.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def nothing(index: int = 0) -> Tensor:
    """Float32, without elements; also the result that stands for "not needed". Two results of one
    call have two indices: torch wants them to be two tensors.
    """
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return torch.empty(0, dtype=torch.float32, device="cpu")


@functools.cache
def scalar() -> Tensor:
    """Float32, one element without dimensions."""
    with torch.inference_mode(False):
        return torch.empty((), dtype=torch.float32, device="cpu")
