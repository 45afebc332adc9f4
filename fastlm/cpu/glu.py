"""glu through csrc/cpu/glu.h. Allocates only the results."""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.memory_order import matrix


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if gate.is_contiguous() and up.is_contiguous():
        y = torch.empty_like(gate)
        _cpu.glu_forward(gate, up, act, y)
    else:
        y = gate.new_empty(gate.shape)
        _cpu.glu_forward(*map(matrix, (gate, up)), act, y)
    return y


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if dy.is_contiguous() and gate.is_contiguous() and up.is_contiguous():
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    else:
        dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        dy, gate, up = map(matrix, (dy, gate, up))
    _cpu.glu_backward(dy, gate, up, act, dgate, dup)
    return dgate, dup
