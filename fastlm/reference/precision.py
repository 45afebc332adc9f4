"""The dtype that the definitions compute in."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
