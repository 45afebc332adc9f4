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
def nothing() -> Tensor:
    """Float32, without elements. An op never returns it: autograd would write the call's graph into
    it, and every later call would return that graph. It returns ``torch.empty_like(nothing())``.
    """
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return torch.empty(0, dtype=torch.float32, device="cpu")


@functools.cache
def scalar() -> Tensor:
    """Float32, one element without dimensions."""
    with torch.inference_mode(False):
        return torch.empty((), dtype=torch.float32, device="cpu")
