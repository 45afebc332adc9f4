"""Learned rounding (in the manner of AutoRound, Cheng et al. 2023, arXiv:2309.05516): the codes of
all weights of a decoder layer are tuned together, so that the layer's output is that of the
unquantized one.

A weight is ``s' q``, ``s' = a s`` (the stored, rounded value) and ``q = round(w / s' + v)``. v, in
[-0.5, 0.5] per weight, decides where it is rounded to; a, near 1 per group, how far it is clipped.
Both follow the sign of their gradients, the rounding straight through. Gradients run through
fastlm's operators.
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
# Bounds of a: a scale keeps its sign, and the learning rate cannot carry a further than 0.5
SCALES = (0.5, 1.5)


class _LearnableRounding:
    """One weight and what is learnt of it: v (N, K), a (N, groups)."""

    def __init__(self, weight: Tensor, start: QuantizedWeight):
        self.weight, self.start = weight, start
        self.v = torch.zeros_like(weight).requires_grad_()
        self.a = torch.ones_like(start.scales, dtype=weight.dtype).requires_grad_()

    def wide(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.start.group_size, 1)[:, : self.weight.shape[1]]

    def scales(self) -> Tensor:
        """As stored; the gradient is that of the unrounded ones."""
        s = self.a * self.start.scales.to(self.a.dtype)
        return s + (s.detach().to(self.start.scales.dtype).to(s.dtype) - s.detach())

    def code(self, s: Tensor) -> Tensor:
        zeros = self.start.zeros
        w = self.weight if zeros is None else self.weight - self.wide(zeros.to(s.dtype))
        low, high = code_range(self.start.bits, zeros is None)
        q = w / self.wide(s) + self.v
        return (q + (q.detach().round() - q.detach())).clamp(low, high)

    def value(self) -> Tensor:
        s, zeros = self.scales(), self.start.zeros
        w = self.code(s) * self.wide(s)
        return w if zeros is None else w + self.wide(zeros.to(w.dtype))

    @torch.no_grad()
    def packed(self) -> QuantizedWeight:
        start, s = self.start, self.scales()
        codes = pack_rows(self.code(s).round(), start.bits)  # exact: 1.9999999 would be cut to 1
        return QuantizedWeight(
            codes, s.to(start.scales.dtype), start.zeros, start.bits, start.group_size, start.shape
        )


def learn_rounding(
    layer: nn.Module,
    starts: Mapping[str, QuantizedWeight],
    inputs: Tensor,
    wanted: Tensor,
    context: ForwardContext,
    *,
    iterations: int,
    seed: int,
) -> dict[str, QuantizedWeight]:
    """Tune the codes of a decoder layer's weights.

    Args:
        layer: unquantized, float32.
        starts: name of a linear layer inside it -> its weight, rounded to nearest.
        inputs: (windows, S, E): what enters the layer.
        wanted: (windows, S, E): what should leave it.
        iterations: steps of `BATCH` windows; the learning rate falls from 1 / iterations to 0.
        seed: of the draws of windows.

    Returns the best of the start, the iterate with the smallest loss on its batch, and the last
    one, by the mean squared error on all windows.
    """
    rounded = {n: _LearnableRounding(get_weight(layer, n).detach(), q) for n, q in starts.items()}
    generator = torch.Generator().manual_seed(seed)
    learnt = [p for r in rounded.values() for p in (r.v, r.a)]
    bounds = [(-0.5, 0.5), SCALES] * len(rounded)
    size = min(BATCH, len(inputs))

    def state() -> list[Tensor]:
        return [p.detach().clone() for p in learnt]

    @torch.no_grad()
    def load(state: list[Tensor]) -> None:
        for p, value in zip(learnt, state, strict=True):
            p.copy_(value)

    start = best = state()
    least = float("inf")

    def loss_of(rows: Tensor | slice) -> Tensor:
        weights = {f"{n}.weight": r.value() for n, r in rounded.items()}
        stream, branch = functional_call(layer, weights, (inputs[rows], None, context))
        return F.mse_loss(stream + branch, wanted[rows])

    for step in range(iterations):
        rows = torch.randperm(len(inputs), generator=generator)[:size]
        loss = loss_of(rows)
        gradients = torch.autograd.grad(loss, learnt)
        if (now := float(loss.detach())) < least:
            best, least = state(), now
        lr = (1 - step / iterations) / iterations
        with torch.no_grad():
            for p, gradient, (low, high) in zip(learnt, gradients, bounds, strict=True):
                p.sub_(gradient.sign_(), alpha=lr).clamp_(low, high)

    @torch.no_grad()
    def error(state: list[Tensor]) -> float:
        load(state)
        batches = range(0, len(inputs), size)
        return sum(float(loss_of(slice(b, b + size))) * len(inputs[b : b + size]) for b in batches)

    load(min((start, best, state()), key=error))
    return {n: r.packed() for n, r in rounded.items()}
