"""glu through csrc/cuda/glu.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, stream
from fastlm.cuda.quantized_linear import Rounded
from fastlm.memory_order import matrix
from fastlm.ops.glu import ACTIVATIONS
from fastlm.ops.quantized_weight import QuantizedWeight


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return contiguous tensors, or matrices with any row stride but contiguous rows."""
    return tensors if all(t.is_contiguous() for t in tensors) else tuple(map(matrix, tensors))


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        extension().glu_forward(*_rows(gate, up), ACTIVATIONS.index(act), y, stream(gate))
    return y


def glu_round(gate: Tensor, up: Tensor, act: str, into: QuantizedWeight) -> Rounded:
    """Return the rounded input of ``quantized_linear(glu(gate, up), into, act_bits=8)``."""
    y = Rounded.empty(gate, into.scales, into.group_size)
    rows = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    extension().glu_round(
        *(t if t.stride(-1) == 1 else t.contiguous() for t in rows), ACTIVATIONS.index(act),
        into.qdata, into.scales, into.bits, into.group_size, *y[:3], stream(gate),
    )  # fmt: skip
    return y
