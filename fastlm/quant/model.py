"""`quantize` replaces nn.Linear and nn.Embedding of any model in place; `load_quantized` does so
from a saved configuration.

A weight that several modules share (an embedding tied to the head) is quantized once and stays
shared. Rejected: tensor subclasses in place of parameters. Every op of a model would have to handle
them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.errors import InputError
from fastlm.ops.linear import Linear
from fastlm.ops.quantized_weight import ANY_K, QuantizedWeight, check_group_size
from fastlm.quant.modules import QuantizedEmbedding, QuantizedLinear

FORMATS = {"w4a16": (4, 16), "w8a16": (8, 16), "w8a8": (8, 8), "w4a8": (4, 8)}
METHODS = ("rtn",)
# Other subclasses may compute something else with their weight.
_REPLACED = (nn.Linear, Linear, nn.Embedding)


def quantize(
    model: nn.Module,
    format: str,
    *,
    group_size: int = 128,
    method: str = "rtn",
    calibration: Any = None,
    embeddings: int | None = 0,
    head: int | None = 0,
    scale_dtype: torch.dtype = torch.bfloat16,
    track: Callable | None = None,
) -> nn.Module:
    """Replace every ``nn.Linear`` by `QuantizedLinear` and every ``nn.Embedding`` by
    `QuantizedEmbedding`, in place.

    Args:
        model: any module tree; returned.
        format: w4a16, w8a16, w8a8 or w4a8: bits of the weights and of the activations of the linear
            layers.
        group_size: columns per scale, see `fastlm.ops.quantize_weight`.
        method: "rtn", round to nearest.
        calibration: for methods that look at activations; refused by rtn.
        embeddings: bits of the embeddings: 4, 8, 16 or None (left as they are), or 0: those of
            `format`.
        head: bits of the head, likewise. The head is the linear layer that
            `model.get_output_embeddings()` or an attribute `lm_head` names. A head tied to an
            embedding shares its quantized weight, so the two must not disagree.
        scale_dtype: dtype of the scales.
        track: progress, as in `fastlm.progress`.

    Raises:
        InputError: an unknown format or method, sizes that do not fit, tied weights with different
            bits.
    """
    check_options(format, group_size, method, embeddings, head)
    if calibration is not None:
        raise InputError(f"calibration: {method} uses none, got {type(calibration).__name__}")
    bits, act_bits = FORMATS[format]
    head_module = find_head(model)
    if head_module is None and head not in (0, embeddings):
        raise InputError(
            f"head: {type(model).__name__} has none beside its embeddings: wanted 0, got {head}"
        )
    plan: list[tuple[str, nn.Linear | nn.Embedding, int]] = []
    wishes: dict[int, tuple[str, int | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in _REPLACED:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)
        wish = (
            embeddings if isinstance(module, nn.Embedding) else head if module is head_module else 0
        )
        wish = {0: bits, 16: None}.get(wish, wish) if wish is not None else None
        other, before = wishes.setdefault(id(module.weight), (name, wish))
        if before != wish:
            raise InputError(
                f"{'head' if module is head_module else 'embeddings'}: {name} shares its weight"
                f" with {other}: wanted the same bits for both, got {wish} and {before}"
            )
        if wish is not None:
            plan.append((name, module, wish))
    if not plan:
        if any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in model.modules()):
            raise InputError("model: wanted one that is not quantized yet, got one that is")
        raise InputError(
            f"model: {type(model).__name__} has no nn.Linear or nn.Embedding to quantize"
        )

    done: dict[int, QuantizedWeight] = {}
    steps = track(plan, "quantize", total=len(plan), unit="layers") if track else plan
    for name, module, wish in steps:
        key = id(module.weight)
        if key not in done:
            done[key] = ops.quantize_weight(
                module.weight, wish, group_size=group_size, scale_dtype=scale_dtype
            )
        model = put_quantized(model, name, done[key], act_bits=act_bits)
    return model


def check_options(
    format: str, group_size: int, method: str, embeddings: int | None, head: int | None
) -> None:
    """Raise InputError for options that `quantize` refuses for every model."""
    if format not in FORMATS:
        raise InputError(f"format: wanted one of {', '.join(FORMATS)}, got {format!r}")
    if method not in METHODS:
        raise InputError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    check_group_size(group_size, ANY_K)
    for name, wish in (("embeddings", embeddings), ("head", head)):
        if wish not in (None, 0, 4, 8, 16):
            raise InputError(f"{name}: wanted 4, 8, 16 or 0 (as the format), got {wish!r}")


def find_head(model: nn.Module) -> nn.Module | None:
    """Return the output layer, by Hugging Face's conventions."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else getattr(model, "lm_head", None)


def put_quantized(
    model: nn.Module,
    name: str,
    weight: QuantizedWeight,
    *,
    act_bits: int = 16,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace the nn.Linear or nn.Embedding `name` by `weight`, keeping its bias; return the model.

    `dtype`: dtype of the rows that an embedding returns, by default its own. InputError: no such
    module, another shape.
    """
    old = _module(model, name)
    if old.weight.shape != weight.shape:
        raise InputError(
            f"{name}: wanted shape {list(old.weight.shape)} as the model, got {list(weight.shape)}"
        )
    if isinstance(old, nn.Linear):
        new: nn.Module = QuantizedLinear(weight, old.bias, act_bits=act_bits)
    elif old.max_norm is None:
        new = QuantizedEmbedding(weight, dtype=dtype or old.weight.dtype, act_bits=act_bits)
    else:
        raise InputError(
            "model: an nn.Embedding with max_norm rescales its rows; it cannot be quantized"
        )
    new.train(old.training)
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def _module(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"{name} is not a module of the model") from None
    if type(module) not in _REPLACED:
        raise InputError(f"{name}: wanted nn.Linear or nn.Embedding, got {type(module).__name__}")
    assert isinstance(module, nn.Linear | nn.Embedding)
    return module


def describe(kind: str, weight: QuantizedWeight) -> dict[str, Any]:
    """Return the entry of a ``quantization_config`` for one "linear" or "embedding"."""
    return {
        "kind": kind,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "shape": list(weight.shape),
        "scale_dtype": str(weight.scales.dtype).removeprefix("torch."),
        "zeros": weight.zeros is not None,
    }


def quantization_config(
    model: nn.Module, format: str, *, group_size: int, method: str = "rtn"
) -> dict[str, Any]:
    """Return what config.json states about a quantized model: enough to read its weights and
    rebuild its modules.
    """
    modules: dict[str, dict[str, Any]] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, QuantizedLinear):
            modules[name] = {**describe("linear", m.weight), "act_bits": m.act_bits}
        elif isinstance(m, QuantizedEmbedding):
            modules[name] = {**describe("embedding", m.weight), "act_bits": m.act_bits}
    return {
        "quant_method": "fastlm",
        "format": format,
        "group_size": group_size,
        "method": method,
        "modules": modules,
    }


def load_quantized(
    model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> nn.Module:
    """Replace modules as ``quantization_config`` says and fill the whole model from `state`,
    strictly.

    `state` has ``<name>.qdata``, ``<name>.scales`` and, if asymmetric, ``<name>.zeros`` for
    quantized modules. A tied head may be absent from it; it then shares the embedding's weight.
    """
    if config.get("quant_method") != "fastlm":
        raise InputError(
            f"quantization_config: wanted quant_method 'fastlm', got {config.get('quant_method')!r}"
        )
    weights = {}
    for name, entry in config["modules"].items():
        if f"{name}.qdata" not in state:
            continue
        missing = [
            p
            for p in ("scales", *(["zeros"] if entry["zeros"] else []))
            if f"{name}.{p}" not in state
        ]
        if missing:
            raise InputError(f"state: {name}.{missing[0]} is missing")
        weights[name] = QuantizedWeight(
            state[f"{name}.qdata"],
            state[f"{name}.scales"],
            state.get(f"{name}.zeros"),
            entry["bits"],
            entry["group_size"],
            tuple(entry["shape"]),
        )
    # tied modules share one parameter
    keys = {name: id(_module(model, name).weight) for name in config["modules"]}
    shared = {keys[name]: weight for name, weight in weights.items()}
    for name, entry in config["modules"].items():
        weight = weights.get(name) or shared.get(keys[name])
        if weight is None:
            raise InputError(f"state: {name}.qdata is missing")
        model = put_quantized(model, name, weight, act_bits=entry.get("act_bits", 16))
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    # names whose storage another name of the state has already filled
    filled = {t.data_ptr() for n, t in model.state_dict().items() if n in state}
    missing = [n for n in missing if model.state_dict()[n].data_ptr() not in filled]
    if missing or unexpected:
        raise InputError(
            f"state: missing {', '.join(missing) or 'nothing'};"
            f" not of the model: {', '.join(unexpected) or 'nothing'}"
        )
    return model
