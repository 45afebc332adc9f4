"""`quantize`: nn.Linear and nn.Embedding of any model replaced in place, and the same from a saved
configuration.

A weight that several modules share (an embedding tied to the head) is quantized once and stays
shared. Rejected: tensor subclasses in place of parameters, which every op of a model would then
have to know.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.errors import InputError
from fastlm.quant.modules import QuantizedEmbedding, QuantizedLinear
from fastlm.quant.weight import ANY_K, QuantizedWeight, check_group_size

FORMATS = {"w4a16": (4, 16), "w8a16": (8, 16), "w8a8": (8, 8), "w4a8": (4, 8)}
METHODS = ("rtn",)


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
        format: w4a16, w8a16, w8a8 or w4a8: bits of the weights and of the activations of the
        linear layers. group_size: columns per scale, see `fastlm.ops.quantize_weight`. method:
        "rtn", round to nearest. calibration: for methods that look at activations; refused by rtn.
        embeddings: bits of the embeddings: 4, 8, 16 or None (left as they are), or 0: those of
        `format`.
        head: bits of the head, the linear layer that `model.get_output_embeddings()` or an
        attribute `lm_head`
            names, likewise. A head tied to an embedding shares its quantized weight, so the two
            must not disagree.
        scale_dtype: of the scales.
        track: progress, as `fastlm.progress`.

    Raises:
        InputError: an unknown format or method, sizes that do not fit, tied weights with two
        wishes.
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
        # subclasses may compute something else with their weight
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)  # its type is one of the two
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
        raise InputError(
            f"model: {type(model).__name__} has no nn.Linear or nn.Embedding to quantize"
        )

    done: dict[int, QuantizedWeight] = {}
    steps = track(plan, "quantize", total=len(plan), unit="layer") if track else plan
    for name, module, wish in steps:
        key = id(module.weight)
        if key not in done:
            done[key] = ops.quantize_weight(
                module.weight, wish, group_size=group_size, scale_dtype=scale_dtype
            )
        if isinstance(module, nn.Embedding):
            new = _embedding(module, done[key])
        else:
            new = QuantizedLinear(done[key], module.bias, act_bits=act_bits)
        new.train(module.training)
        model = _replace(model, name, new)
    return model


def check_options(
    format: str, group_size: int, method: str, embeddings: int | None, head: int | None
) -> None:
    """InputError for what `quantize` refuses whatever the model."""
    if format not in FORMATS:
        raise InputError(f"format: wanted one of {', '.join(FORMATS)}, got {format!r}")
    if method not in METHODS:
        raise InputError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    check_group_size(group_size, ANY_K)
    for name, wish in (("embeddings", embeddings), ("head", head)):
        if wish not in (None, 0, 4, 8, 16):
            raise InputError(f"{name}: wanted 4, 8, 16 or 0 (as the format), got {wish!r}")


def find_head(model: nn.Module) -> nn.Module | None:
    """The output layer, by Hugging Face's conventions."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else getattr(model, "lm_head", None)


def _embedding(module: nn.Embedding, weight: QuantizedWeight) -> QuantizedEmbedding:
    if module.max_norm is not None:
        raise InputError(
            "model: an nn.Embedding with max_norm rescales its rows; it cannot be quantized"
        )
    return QuantizedEmbedding(weight, dtype=module.weight.dtype)


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def quantization_config(
    model: nn.Module, format: str, *, group_size: int, method: str = "rtn"
) -> dict[str, Any]:
    """What config.json says of a quantized model: enough to rebuild its modules with empty
    buffers.
    """
    modules = {
        name: {
            "kind": "embedding" if isinstance(m, QuantizedEmbedding) else "linear",
            "bits": m.bits,
            "group_size": m.group_size,
            "shape": list(m.shape),
            "scale_dtype": str(m.scales.dtype).removeprefix("torch."),
            "zeros": m.zeros is not None,
            **({"act_bits": m.act_bits} if isinstance(m, QuantizedLinear) else {}),
        }
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, QuantizedLinear | QuantizedEmbedding)
    }
    return {
        "quant_method": "fastlm",
        "format": format,
        "group_size": group_size,
        "method": method,
        "modules": modules,
    }


def apply_config(
    model: nn.Module,
    config: Mapping[str, Any],
    weights: Mapping[str, QuantizedWeight] | None = None,
) -> nn.Module:
    """Replace the modules that `config` (a ``quantization_config``) lists by quantized ones with
    the `weights` given (module name -> weight), or with zeros to be filled by ``load_state_dict``.
    Tied modules share one weight."""
    made: dict[int, QuantizedWeight] = {}
    for name, entry in config["modules"].items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"quantization_config: {name} is not a module of the model") from None
        if type(module) not in (nn.Linear, nn.Embedding):
            raise InputError(
                f"quantization_config: {name}: wanted nn.Linear or nn.Embedding,"
                f" got {type(module).__name__}"
            )
        assert isinstance(module, nn.Linear | nn.Embedding)  # its type is one of the two
        if list(module.weight.shape) != list(entry["shape"]):
            raise InputError(
                f"quantization_config: {name}: wanted shape {list(module.weight.shape)}"
                f" as the model, got {entry['shape']}"
            )
        weight = (weights or {}).get(name)
        if weight is None:
            weight = made.get(id(module.weight)) or _blank(entry, module.weight.device)
        made[id(module.weight)] = weight
        if isinstance(module, nn.Embedding):
            new: nn.Module = _embedding(module, weight)
        else:
            new = QuantizedLinear(weight, module.bias, act_bits=entry.get("act_bits", 16))
        model = _replace(model, name, new.train(module.training))
    return model


def _blank(entry: Mapping[str, Any], device: torch.device) -> QuantizedWeight:
    n, k = entry["shape"]
    bits = entry["bits"]
    groups = -(-k // check_group_size(entry["group_size"], k))
    dtype = getattr(torch, entry["scale_dtype"])
    qdata = (
        torch.zeros(n, k, dtype=torch.int8, device=device)
        if bits == 8
        else torch.full((n, (k + 1) // 2), 0x88, dtype=torch.uint8, device=device)
    )
    scales = torch.zeros(n, groups, dtype=dtype, device=device)
    zeros = torch.zeros_like(scales) if entry["zeros"] else None
    return QuantizedWeight(qdata, scales, zeros, bits, entry["group_size"], (n, k))


def load_quantized(
    model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> nn.Module:
    """Replace modules as ``quantization_config`` says and fill the whole model from `state`,
    strictly.

    `state` has ``<name>.qdata``, ``<name>.scales`` and where asymmetric ``<name>.zeros`` for
    quantized modules. A tied head may be absent from it: it then shares the embedding's.
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
    model = apply_config(model, config, weights)
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
