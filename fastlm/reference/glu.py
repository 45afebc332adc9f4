"""The definition of `glu`."""

import math

import torch
from torch import Tensor

from fastlm.reference.precision import widen
from fastlm.reference.quantized_linear import int8_rows


def activation(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.nn.functional.silu(x)
    if act == "relu2":
        return torch.relu(x).square()
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def glu_forward(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """Compute y = act(gate) * up, elementwise; act(gate) without up."""
    y = activation(widen(gate), act)
    return (y if up is None else y * widen(up)).to(gate.dtype).contiguous()


def glu_round(
    gate: Tensor, up: Tensor, qdata: Tensor, scales: Tensor, act: str, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `int8_rows` of act(gate) * up for `rounded_linear` with the weight (qdata, scales)."""
    return int8_rows(glu_forward(gate, up, act), bits, group_size)


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    """Return dgate = dy * up * act'(gate) and dup = dy * act(gate); dup is empty without up."""
    g, x = widen(dy), widen(gate)
    if act == "silu":
        s = torch.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    elif act == "relu2":
        positive = torch.relu(x)
        value, slope = positive.square(), 2 * positive
    elif act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        value = x * cdf
        slope = cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        value = 0.5 * x * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * c * (1 + 3 * 0.044715 * x.square())
    if up is None:
        return (g * slope).to(gate.dtype).contiguous(), gate.new_empty(0)
    dgate = g * widen(up) * slope
    return dgate.to(gate.dtype).contiguous(), (g * value).to(gate.dtype).contiguous()
