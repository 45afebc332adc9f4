"""What comes of quantizing a part of a model, how far it is off, and the file that keeps it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlm.files import make_folder, save_atomic
from fastlm.ops import quantize_weight
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant.targets import Target

PARTS = ("qdata", "scales", "zeros")


@dataclass
class StepResult:
    """What came of one step: the embeddings, a decoder layer, the head, or the distillation.
    ``errors``: name of a layer -> squared error of its output, as a share of the output's square.
    ``powers`` and ``floats``: of AWQ's scales, see `fastlm.quant.awq.scale_features`; ``floats``
    are new values of parameters. ``distillation``: figures of `fastlm.quant.distill`.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    distillation: dict[str, Any] = field(default_factory=dict)

    def add(self, other: "StepResult") -> None:
        self.warnings += other.warnings
        for name in ("weights", "errors", "powers", "floats", "distillation"):
            getattr(self, name).update(getattr(other, name))


def round_to_nearest(target: Target, moments: Tensor | None = None) -> StepResult:
    """Round a layer to nearest, weighted by `moments`, (K,): sums of squares of its inputs."""
    w = target.module.weight.detach()
    q = quantize_weight(w, **vars(target.scheme), importance=moments)
    return StepResult({target.name: q}, {target.name: relative_error(w, q, moments)})


def get_weight(layer: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer inside `layer`."""
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


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


def save_tensors(file: Path, key: str, tensors: Mapping[str, Tensor], **values: Any) -> None:
    """Write tensors and JSON values, whole or not at all. ``key``: `load_tensors` wants the
    same.
    """
    make_folder(file.parent)
    metadata = {"key": key, "values": json.dumps(values)}
    save_atomic(file, lambda part: save_file(dict(tensors), part, metadata=metadata))


def load_tensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_tensors` wrote; None: nothing, or of other weights or options."""
    try:
        with safe_open(file, framework="pt") as kept:
            metadata = kept.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}
            return tensors, json.loads(metadata["values"])
    except (OSError, SafetensorError):
        return None


def save_step_result(file: Path, key: str, step: StepResult) -> None:
    tensors, layouts = dict(step.floats), {}
    for name, q in step.weights.items():
        layouts[name] = [q.bits, q.group_size, q.shape]
        parts = zip(PARTS, (q.qdata, q.scales, q.zeros))
        tensors |= {f"{name}.{part}": t for part, t in parts if t is not None}
    rest = {k: v for k, v in vars(step).items() if k not in ("weights", "floats")}
    save_tensors(file, key, tensors, layouts=layouts, floats=list(step.floats), **rest)


def load_step_result(file: Path, key: str) -> StepResult | None:
    if (kept := load_tensors(file, key)) is None:
        return None
    tensors, values = kept
    weights = {}
    for name, (bits, size, shape) in values.pop("layouts").items():
        qdata, scales, zeros = (tensors.get(f"{name}.{part}") for part in PARTS)
        assert qdata is not None and scales is not None
        weights[name] = QuantizedWeight(qdata, scales, zeros, bits, size, tuple(shape))
    floats = {name: tensors[name] for name in values.pop("floats")}
    return StepResult(weights=weights, floats=floats, **values)
