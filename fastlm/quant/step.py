"""What comes of quantizing a part of a model, and how far it is off."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlm.ops import quantize_weight
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant.plan import Target


@dataclass
class Step:
    """What came of one step: the embeddings, a decoder layer, or the head. ``errors``: name of a
    layer -> squared error of its output, as a share of the output's square. ``powers`` and
    ``floats``: of AWQ's scales, see `fastlm.quant.awq.scale_features`.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Step") -> None:
        self.weights |= other.weights
        self.errors |= other.errors
        self.powers |= other.powers
        self.floats |= other.floats
        self.warnings += other.warnings


def nearest(target: Target, moments: Tensor | None = None) -> Step:
    """Round a layer to nearest, weighted by `moments`, (K,): sums of squares of its inputs."""
    w = target.module.weight.detach()
    q = quantize_weight(w, **vars(target.scheme), importance=moments)
    return Step({target.name: q}, {target.name: relative_error(w, q, moments)})


def relative_error(weight: Tensor, quantized: QuantizedWeight, moments: Tensor | None) -> float:
    """Squared error of the outputs as a share of their square; of the weights without moments."""
    w = weight.detach().float()
    moments = torch.ones_like(w[0]) if moments is None else moments.float()
    size = (w.square() * moments).sum() if moments.dim() == 1 else ((w @ moments) * w).sum()
    return output_error(w, quantized, moments) / max(float(size), 1e-30)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """``trace(D hessian D^T)``; hessian (K, K), or its diagonal (K,)."""
    d = quantized.dequantize(hessian.dtype) - weight
    if hessian.dim() == 1:
        return float((d.square() * hessian).sum())
    return float(((d @ hessian) * d).sum())
