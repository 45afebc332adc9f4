"""What comes of quantizing a part of a model, how far it is off, and the file that keeps it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlm.files import make_folder, save_atomic
from fastlm.ops import quantize_weight
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant.plan import Target

PARTS = ("qdata", "scales", "zeros")


@dataclass
class Step:
    """What came of one step: the embeddings, a decoder layer, the head, or the distillation.
    ``errors``: name of a layer -> squared error of its output, as a share of the output's square.
    ``powers`` and ``floats``: of AWQ's scales, see `fastlm.quant.awq.scale_features`; ``floats``
    are new values of parameters. ``distilled``: figures of `fastlm.quant.distill`.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    distilled: dict[str, Any] = field(default_factory=dict)

    def add(self, other: "Step") -> None:
        self.weights |= other.weights
        self.errors |= other.errors
        self.powers |= other.powers
        self.floats |= other.floats
        self.warnings += other.warnings
        self.distilled |= other.distilled


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


def digest(told: Any, *tensors: Tensor) -> str:
    """Return a hash of JSON values and tensors; a kept file is valid for one such hash."""
    found = hashlib.sha256(json.dumps(told, default=str).encode())
    for tensor in tensors:
        data = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        found.update(data.numpy().data)
    return found.hexdigest()


def keep_step(file: Path, key: str, step: Step) -> None:
    """Write a step, whole or not at all. ``key``: `read_step` wants the same."""
    make_folder(file.parent)
    tensors, layouts = {}, {}
    for name, q in step.weights.items():
        layouts[name] = [q.bits, q.group_size, *q.shape]
        parts = zip(PARTS, (q.qdata, q.scales, q.zeros))
        tensors |= {f"{name}.{part}": t for part, t in parts if t is not None}
    tensors |= step.floats
    told = {"layouts": layouts, "errors": step.errors, "warnings": step.warnings,
            "powers": step.powers, "floats": list(step.floats),
            "distilled": step.distilled}  # fmt: skip
    metadata = {"key": key, "step": json.dumps(told)}
    save_atomic(file, lambda part: save_file(tensors, part, metadata=metadata))


def read_step(file: Path, key: str) -> Step | None:
    """A kept step; None where there is none, or one of other weights or options."""
    try:
        with safe_open(file, framework="pt") as kept:
            metadata = kept.metadata() or {}
            if metadata.get("key") != key:
                return None
            told = json.loads(metadata["step"])
            names = set(kept.keys())
            weights = {}
            for name, (bits, size, n, k) in told["layouts"].items():
                qdata, scales, zeros = (f"{name}.{part}" for part in PARTS)
                weights[name] = QuantizedWeight(
                    kept.get_tensor(qdata), kept.get_tensor(scales),
                    kept.get_tensor(zeros) if zeros in names else None, bits, size, (n, k),
                )  # fmt: skip
            floats = {name: kept.get_tensor(name) for name in told["floats"]}
    except (OSError, SafetensorError):
        return None
    return Step(
        weights, told["errors"], told["powers"], floats, told["warnings"], told["distilled"]
    )
