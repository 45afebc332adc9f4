"""Learned rounding, as AutoRound (Cheng et al. 2023, arXiv:2309.05516), tunes the codes of all
weights of a decoder layer together, so that the layer's output matches the unquantized layer's.

A weight is ``s' q`` with ``s' = a s`` (rounded to its stored dtype) and ``q = round(w / s' + v)``.
v, in [-0.5, 0.5] per weight, decides the direction of rounding. a, near 1 per group, decides the
clipping. Both follow the sign of their gradients, which pass straight through the rounding and
through fastlm's operators.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastlm.model.layers import ForwardContext
from fastlm.ops.quantize_weight import code_range
from fastlm.ops.quantized_weight import QuantizedWeight, pack_rows
from fastlm.quant.step_result import get_weight

BATCH = 8  # windows per step, AutoRound's
# bounds of a: a scale keeps its sign, and the learning rate cannot move a by more than 0.5
SCALES = (0.5, 1.5)


class _LearnableRounding:
    """A weight and its trainable parameters v (N, K) and a (N, groups)."""

    def __init__(self, weight: Tensor, start: QuantizedWeight):
        self.weight, self.start = weight, start
        self.v = torch.zeros_like(weight).requires_grad_()
        self.a = torch.ones_like(start.scales, dtype=weight.dtype).requires_grad_()

    def wide(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.start.group_size, 1)[:, : self.weight.shape[1]]

    def scales(self) -> Tensor:
        """Return the stored scales, with the gradient of the unrounded ones."""
        s = self.a * self.start.scales.to(self.a.dtype)
        return s + (s.detach().to(self.start.scales.dtype).to(s.dtype) - s.detach())

    def codes(self, s: Tensor) -> Tensor:
        zeros = self.start.zeros
        w = self.weight if zeros is None else self.weight - self.wide(zeros.to(s.dtype))
        low, high = code_range(self.start.bits, zeros is None)
        q = w / self.wide(s) + self.v
        return (q + (q.detach().round() - q.detach())).clamp(low, high)

    def value(self) -> Tensor:
        s, zeros = self.scales(), self.start.zeros
        w = self.codes(s) * self.wide(s)
        return w if zeros is None else w + self.wide(zeros.to(w.dtype))

    @torch.no_grad()
    def to_quantized(self) -> QuantizedWeight:
        start, s = self.start, self.scales()
        packed = pack_rows(self.codes(s).round(), start.bits)  # else 1.9999999 would become 1
        return QuantizedWeight(
            packed, s.to(start.scales.dtype), start.zeros, start.bits, start.group_size, start.shape
        )


def learn_rounding(
    layer: nn.Module,
    initial: Mapping[str, QuantizedWeight],
    inputs: Tensor,
    target_outputs: Tensor,
    context: ForwardContext,
    *,
    iterations: int,
    seed: int,
) -> dict[str, QuantizedWeight]:
    """Tune the codes of a decoder layer's weights.

    Args:
        layer: unquantized, float32.
        initial: name of a linear layer inside it -> its weight, rounded to nearest.
        inputs: (windows, S, E), the layer's inputs.
        target_outputs: (windows, S, E), the unquantized layer's outputs.
        iterations: steps of `BATCH` windows; the learning rate falls from 1 / iterations to 0.
        seed: of the draws of windows.

    Returns the best of the start, the iterate with the smallest loss on its batch, and the last
    one, by the mean squared error on all windows.
    """
    roundings = {
        n: _LearnableRounding(get_weight(layer, n).detach(), q) for n, q in initial.items()
    }
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for r in roundings.values() for p in (r.v, r.a)]
    bounds = [(-0.5, 0.5), SCALES] * len(roundings)
    size = min(BATCH, len(inputs))

    def state() -> list[Tensor]:
        return [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def load(state: list[Tensor]) -> None:
        for p, value in zip(parameters, state, strict=True):
            p.copy_(value)

    start = best = state()
    min_loss = float("inf")

    def compute_loss(rows: Tensor | slice) -> Tensor:
        weights = {f"{n}.weight": r.value() for n, r in roundings.items()}
        stream, branch = functional_call(layer, weights, (inputs[rows], None, context))
        return F.mse_loss(stream + branch, target_outputs[rows])

    for step in range(iterations):
        rows = torch.randperm(len(inputs), generator=generator)[:size]
        loss = compute_loss(rows)
        gradients = torch.autograd.grad(loss, parameters)
        if (value := float(loss.detach())) < min_loss:
            best, min_loss = state(), value
        lr = (1 - step / iterations) / iterations
        with torch.no_grad():
            for p, gradient, (low, high) in zip(parameters, gradients, bounds, strict=True):
                p.sub_(gradient.sign_(), alpha=lr).clamp_(low, high)

    @torch.no_grad()
    def error(state: list[Tensor]) -> float:
        load(state)
        batches = range(0, len(inputs), size)
        return sum(
            float(compute_loss(slice(b, b + size))) * len(inputs[b : b + size]) for b in batches
        )

    load(min((start, best, state()), key=error))
    return {n: r.to_quantized() for n, r in roundings.items()}
