"""rms_norm by csrc/cuda/rms_norm.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, stream


def _rows(t: Tensor) -> Tensor:
    """Contiguous, or (rows, width) with rows apart and elements of a row side by side."""
    if t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if weight.dtype != x.dtype:
        weight = weight.float()
    extension().rms_norm_forward(
        _rows(x), None if residual is None else _rows(residual), weight.contiguous(), eps, offset,
        y, h, rstd, stream(x),
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, rstd
