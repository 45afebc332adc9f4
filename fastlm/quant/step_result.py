"""The result of quantizing a part of a model, its errors, and the file that stores it."""

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
    """The result of one step: the embeddings, a decoder layer, the head, or the distillation.

    ``errors``: name of a layer -> squared error of its output, as a share of the output's square.
    ``powers`` and ``floats``: AWQ's, see `fastlm.quant.awq.scale_features`; ``floats`` are new
    values of parameters. ``distillation``: metrics of `fastlm.quant.distill`.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    distillation: dict[str, Any] = field(default_factory=dict)

    def add(self, other: "StepResult") -> None:
        """Add the entries of another result."""
        self.warnings += other.warnings
        for name in ("weights", "errors", "powers", "floats", "distillation"):
            getattr(self, name).update(getattr(other, name))


def round_to_nearest(target: Target, moments: Tensor | None = None) -> StepResult:
    """Round a layer to nearest, weighted by `moments`, (K,): sums of squares of its inputs."""
    w = target.module.weight.detach()
    q = quantize_weight(w, **vars(target.scheme), importance=moments)
    return StepResult({target.name: q}, {target.name: relative_error(w, q, moments)})


def get_weight(layer: nn.Module, name: str) -> Tensor:
    """Return the weight of a linear layer inside `layer`."""
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def relative_error(weight: Tensor, quantized: QuantizedWeight, moments: Tensor | None) -> float:
    """Return the squared error of the outputs as a share of their square; without moments, of the
    weights.
    """
    w = weight.detach().float()
    moments = torch.ones_like(w[0]) if moments is None else moments.float()
    size = (w.square() * moments).sum() if moments.dim() == 1 else ((w @ moments) * w).sum()
    return output_error(w, quantized, moments) / max(float(size), 1e-30)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Return ``trace(D hessian D^T)``, D the error; hessian is (K, K), or its diagonal (K,)."""
    d = quantized.dequantize(hessian.dtype) - weight
    if hessian.dim() == 1:
        return float((d.square() * hessian).sum())
    return float(((d @ hessian) * d).sum())


def cache_key(values: Any, *tensors: Tensor) -> str:
    """Return a hash of JSON values and tensors. A stored file is valid for one such hash."""
    digest = hashlib.sha256(json.dumps(values, default=str).encode())
    for tensor in tensors:
        data = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def save_tensors(file: Path, key: str, tensors: Mapping[str, Tensor], **values: Any) -> None:
    """Write tensors and JSON values atomically. `load_tensors` needs the same ``key``."""
    make_folder(file.parent)
    metadata = {"key": key, "values": json.dumps(values)}
    save_atomic(file, lambda part: save_file(dict(tensors), part, metadata=metadata))


def load_tensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what `save_tensors` wrote; None for no file or another key."""
    try:
        with safe_open(file, framework="pt") as file_tensors:
            metadata = file_tensors.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file_tensors.get_tensor(name) for name in file_tensors.keys()}
            return tensors, json.loads(metadata["values"])
    except (OSError, SafetensorError):
        return None


def save_step_result(file: Path, key: str, step: StepResult) -> None:
    """Write a result; ``key`` as in `save_tensors`."""
    tensors, layouts = dict(step.floats), {}
    for name, q in step.weights.items():
        layouts[name] = [q.bits, q.group_size, q.shape]
        parts = zip(PARTS, (q.qdata, q.scales, q.zeros))
        tensors |= {f"{name}.{part}": t for part, t in parts if t is not None}
    rest = {k: v for k, v in vars(step).items() if k not in ("weights", "floats")}
    save_tensors(file, key, tensors, layouts=layouts, floats=list(step.floats), **rest)


def load_step_result(file: Path, key: str) -> StepResult | None:
    """Read the result of `save_step_result`; None as in `load_tensors`."""
    if (saved := load_tensors(file, key)) is None:
        return None
    tensors, values = saved
    weights = {}
    for name, (bits, size, shape) in values.pop("layouts").items():
        qdata, scales, zeros = (tensors.get(f"{name}.{part}") for part in PARTS)
        assert qdata is not None and scales is not None
        weights[name] = QuantizedWeight(qdata, scales, zeros, bits, size, tuple(shape))
    floats = {name: tensors[name] for name in values.pop("floats")}
    return StepResult(weights=weights, floats=floats, **values)
