"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

The names of the tensors determine which layers are adapted. An option of PEFT that would change the
result is refused by its name. An adapter that fastlm wrote also has adapter_base.json, with a
digest of the base's weights and the path to them, relative to its folder. Rejected: the header of
the safetensors file, since that library writes its entries in another order each time.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from annotated_types import Interval
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from fastlm.checkpoint.folder import (
    ADAPTER,
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    BASE_PATH,
    GENERATION,
    link_other_files,
    unshare_tensors,
    write_json,
)
from fastlm.checkpoint.tensor_folder import FLOATS, open_tensors
from fastlm.errors import InputError
from fastlm.files import make_folder, read_json, save_atomic
from fastlm.model.lora import (
    ALL,
    MAX_ALPHA,
    LoraConfig,
    attach_lora,
    check_no_adapters,
    linear_layers,
    lora_layers,
    matches,
    weights_digest,
)
from fastlm.schema import read_document

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

PREFIX = "base_model.model."  # PEFT's wrappers around the model
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of DoRA's magnitude
DIGEST = "base_digest"  # key in adapter_base.json
# Fields of PEFT's LoraConfig that may have any value: they change nothing after training
_IGNORED = {
    *("base_model_name_or_path", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("layers_pattern", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
# Initialisations that also change the base's weights: the adapter does not fit the original base
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class PeftConfig(TypedDict, total=False):
    """The fields of adapter_config.json that are read."""

    peft_type: Required[Literal["LORA"]]
    task_type: Literal["CAUSAL_LM"] | None
    bias: Literal["none"]
    r: Required[Annotated[int, Interval(ge=1)]]
    lora_alpha: Required[Annotated[float, Interval(gt=0, le=MAX_ALPHA)]]
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] | None
    use_rslora: bool | None
    use_dora: bool | None
    init_lora_weights: Any
    target_modules: Any
    layers_to_transform: Any
    exclude_modules: Any


class GenerationConfig(TypedDict, total=False):
    """The fields of an adapter's generation_config.json that are read."""

    eos_token_id: int | list[int] | None


def save_adapter(model: "CausalLM", folder: str | Path, *, base: str | Path = "") -> None:
    """Write the adapters of a model (`fastlm.model.lora.add_lora`) in PEFT's format. PEFT's
    ``PeftModel.from_pretrained(base_model, folder)`` loads them, and so does `load_adapter`.

    ``base``: the model without adapters, as a path or a name such as ``model:smollm2``, where
    ``CausalLM.from_pretrained(folder)`` looks for it. Other files of an existing folder stay; a
    model in it is replaced.

    Raises InputError: a model without adapters, a folder that cannot be written.
    """
    adapters, lora, folder = lora_layers(model), model.lora, Path(folder)
    if lora is None or not adapters:
        raise InputError("model: expected a model with adapters (add_lora), got one without")
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(module, part)
        for name, module in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    if lora.use_dora:
        for name, module in adapters.items():
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = module.magnitude().detach()
    name, base_info = str(base), {DIGEST: lora.base_digest} if lora.base_digest else {}
    if name and not name.startswith("model:") and Path(name).exists():
        name = str(Path(name).resolve())  # PEFT resolves a relative one in the working directory
        base_info[BASE_PATH] = os.path.relpath(name, folder.resolve())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": _target_modules(model, set(adapters)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }

    def write(part: Path) -> None:
        link_other_files(folder, part)
        write_json(part / ADAPTER_CONFIG, config)
        save_file(unshare_tensors(tensors), part / ADAPTER, metadata={"format": "pt"})
        shutil.copymode(part / ADAPTER_CONFIG, part / ADAPTER)  # safetensors: only the owner
        (part / ADAPTER_BASE).unlink(missing_ok=True)  # not written through a hard link
        if base_info:
            write_json(part / ADAPTER_BASE, base_info)
        if ends := sorted(model.config.stop_ids):  # training may have added some to the base's
            (part / GENERATION).unlink(missing_ok=True)  # not written through a hard link
            write_json(part / GENERATION, {"eos_token_id": ends})

    make_folder(folder.parent)
    save_atomic(folder, write)


def _target_modules(model: "CausalLM", adapted: set[str]) -> list[str]:
    """Return the shortest names that match exactly these modules."""
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    plain = {name.removesuffix(".base_layer") for name in linear_layers(model)}
    matched = {name for name in plain if name.rpartition(".")[2] in kinds}
    return kinds if matched == adapted else sorted(adapted)


def load_adapter(model: "CausalLM", folder: str | Path) -> "CausalLM":
    """Attach the adapter in ``folder``, of fastlm or PEFT, to its base model, in place. Return the
    model; its other weights are frozen. It gets the end tokens of the adapter's training.

    Raises InputError: an adapter that is not LoRA, an option that fastlm lacks (trained biases or
    modules, ranks per layer), an adapter of another base. The message names the module, shape or
    digest that differs.
    """
    check_no_adapters(model)
    folder = Path(folder)
    config = _config(folder / ADAPTER_CONFIG)
    model_digest = weights_digest(model)
    use_dora = bool(config.get("use_dora"))
    parts = _module_tensors(folder / ADAPTER, use_dora)
    file = folder / ADAPTER_BASE
    digest = read_json(file).get(DIGEST) if file.is_file() else None
    file, ends = folder / GENERATION, None
    if file.is_file():  # the end tokens that an adapter of fastlm was trained with
        ends = read_document(file, GenerationConfig).get("eos_token_id")
    dropout, use_rslora = config.get("lora_dropout") or 0.0, bool(config.get("use_rslora"))
    base_digest = digest or model_digest
    lora = LoraConfig(config["r"], config["lora_alpha"], dropout, use_rslora, use_dora, base_digest)
    linears = linear_layers(model)
    adapters = {}
    for name, tensors in parts.items():
        if (base := linears.get(name)) is None:
            raise InputError(
                f"{folder}: {name}: expected a linear layer of this model, got none; the adapter "
                "is of"
                " another base"
            )
        shapes = {
            "lora_A": (lora.r, base.in_features),
            "lora_B": (base.out_features, lora.r),
            MAGNITUDE: (base.out_features,),
        }
        for part, tensor in tensors.items():
            if (shape := tuple(tensor.shape)) != (expected := shapes[part]):
                raise InputError(
                    f"{folder}: {name}.{part}: expected {expected} by its rank and this model,"
                    f" got {shape}; the adapter is of another base"
                )
        adapters[name] = tensors["lora_A"].float(), tensors["lora_B"].float()
    for name in _targets(linears, config) - adapters.keys():
        raise InputError(
            f"{folder}: expected an adapter of {name} by target_modules, got none; the adapter is"
            " of another base"
        )
    if digest and model_digest and digest != model_digest:
        raise InputError(
            f"{folder}: expected the base model with the digest {digest}, got one with"
            f" {model_digest}: its weights differ"
        )
    if ends is not None:
        model.config.eos_token_id = ends
    attach_lora(model, adapters, lora)
    if use_dora:
        for name, module in lora_layers(model).items():
            module.set_magnitude(parts[name][MAGNITUDE])
    return model


def _config(path: Path) -> PeftConfig:
    config = read_document(path, PeftConfig, extra="allow")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights: expected one that leaves the base as it is, got"
            f" {init!r:.60}"
        )
    for key, value in config.items():
        if value and key not in PeftConfig.__annotations__ and key not in _IGNORED:
            raise InputError(
                f"{path}: {key}: expected none, fastlm's LoRA does not support it, got "
                f"{value!r:.60}"
            )
    return config


def _module_tensors(file: Path, use_dora: bool) -> dict[str, dict[str, Tensor]]:
    """Return lora_A, lora_B and with DoRA the magnitude by the name of their module."""
    if not file.is_file() and file.with_suffix(".bin").is_file():
        raise InputError(f"{file.parent}: expected {ADAPTER}, got a pickle (convert it first)")
    parts = ["lora_A", "lora_B", *([MAGNITUDE] if use_dora else [])]
    modules: dict[str, dict[str, Tensor]] = {}
    with open_tensors(file) as tensors:
        for name in tensors.keys():
            if (dtype := tensors.get_slice(name).get_dtype()) not in FLOATS:
                raise InputError(
                    f"{file}: {name}: expected one of {', '.join(FLOATS)}, got {dtype}"
                )
            tensor = tensors.get_tensor(name)
            pattern = rf"{re.escape(PREFIX)}(.+)\.(?:(lora_[AB])\.weight|({MAGNITUDE}))"
            match = re.fullmatch(pattern, name)
            if match is None or tensor.dim() != (2 if match[2] else 1):
                raise InputError(
                    f"{file}: {name:.200}: expected lora_A.weight and lora_B.weight of linear"
                    f" layers under {PREFIX}, got this"
                )
            modules.setdefault(match[1], {})[match[2] or match[3]] = tensor
    for module, tensors in modules.items():
        if sorted(tensors) != parts:
            expected, got = (" and ".join(names) for names in (parts, sorted(tensors)))
            raise InputError(f"{file}: {module}: expected {expected}, got {got}")
    if not modules:
        raise InputError(f"{file}: expected the matrices of an adapter, got no tensor")
    return modules


def _targets(linears: Mapping[str, Any], config: PeftConfig) -> set[str]:
    """Return the linear layers that target_modules names. The result is empty where it is a regular
    expression or only some layers are adapted.
    """
    targets = config.get("target_modules")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    if targets == ALL:
        return set(linears)
    targets = targets if isinstance(targets, list) else []
    return {name for name in linears if any(matches(name, target) for target in targets)}
