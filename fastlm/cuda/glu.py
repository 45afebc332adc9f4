"""glu by csrc/cuda/glu.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, stream
from fastlm.cuda.quantized_linear import empty_int8_rows
from fastlm.memory_order import matrix
from fastlm.ops.glu import ACTIVATIONS


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return contiguous tensors, or matrices with any row stride but contiguous rows."""
    return tensors if all(t.is_contiguous() for t in tensors) else tuple(map(matrix, tensors))


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        extension().glu_forward(*_rows(gate, up), ACTIVATIONS.index(act), y, stream(gate))
    return y


def glu_round(
    gate: Tensor, up: Tensor, qdata: Tensor, scales: Tensor, act: str, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_int8_rows(gate, group_size)
    rows = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    extension().glu_round(
        *(t if t.stride(-1) == 1 else t.contiguous() for t in rows), ACTIVATIONS.index(act),
        qdata, scales, bits, group_size, *out, stream(gate),
    )  # fmt: skip
    return out
