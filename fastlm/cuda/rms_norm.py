"""rms_norm by csrc/cuda/rms_norm.cu."""

import torch
from torch import Tensor

from fastlm.backend import Support
from fastlm.cuda import constants, extension, stream
from fastlm.cuda.quantized_linear import empty_int8_rows
from fastlm.memory_order import rows_of

# The kernel keeps a row in shared memory while it rounds it; every card has 48 KiB
ROUND_SUPPORT = Support(
    "rows of up to 48 KiB",
    lambda x, *_: x.shape[-1] * x.element_size() <= constants().RMS_NORM_ROUND_BYTES,
)


def _weight(weight: Tensor | None, x: Tensor) -> Tensor:
    """Return the weight as the kernels accept it: float32 or x's dtype, contiguous."""
    if weight is None:
        return x.new_ones(x.shape[-1])
    return (weight if weight.dtype == x.dtype else weight.float()).contiguous()


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extension().rms_norm_forward(
        rows_of(x), None if residual is None else rows_of(residual), _weight(weight, x), eps,
        offset, y, h, rstd, stream(x),
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, rstd


def rms_norm_round(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    qdata: Tensor,
    scales: Tensor,
    eps: float,
    offset: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = empty_int8_rows(x, group_size)
    extension().rms_norm_round(
        rows_of(x), None if residual is None else rows_of(residual), _weight(weight, x), eps,
        offset, h, qdata, scales, bits, group_size, *out, stream(x),
    )  # fmt: skip
    return *out, x.new_empty(0) if h is None else h
