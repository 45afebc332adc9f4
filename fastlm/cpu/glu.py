"""glu by csrc/cpu/glu.h. This file allocates only the results."""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.cpu.templates import empty_float32
from fastlm.memory_order import matrix


def glu_forward(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    if gate.is_contiguous() and (up is None or up.is_contiguous()):
        y = torch.empty_like(gate)
    else:
        y = gate.new_empty(gate.shape)
        gate, up = matrix(gate), None if up is None else matrix(up)
    _cpu.glu_forward(gate, up, act, y)
    return y


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    if dy.is_contiguous() and gate.is_contiguous() and (up is None or up.is_contiguous()):
        dgate, dup = torch.empty_like(gate), None if up is None else torch.empty_like(gate)
    else:
        dgate = gate.new_empty(gate.shape)
        dup = None if up is None else gate.new_empty(gate.shape)
        dy, gate, up = matrix(dy), matrix(gate), None if up is None else matrix(up)
    _cpu.glu_backward(dy, gate, up, act, dgate, dup)
    return dgate, empty_float32().new_empty(0, dtype=gate.dtype) if dup is None else dup
