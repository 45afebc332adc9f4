"""The dtype in which the definitions compute."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
