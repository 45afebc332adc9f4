"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

Which layers are adapted follows from the names of the tensors, and an option of PEFT that would
change what is computed is refused by its name. An adapter that fastlm wrote also states in
adapter_base.json which weights it belongs to, and where they lie from its folder. Rejected: the
header of the safetensors file, whose entries that library writes in another order each time.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from fastlm.checkpoint.folder import (
    ADAPTER,
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    BASE_PATH,
    GENERATION,
    begin_folder,
    own_memory,
    write_json,
)
from fastlm.checkpoint.tensor_folder import FLOATS, open_tensors
from fastlm.errors import InputError
from fastlm.files import make_folder, read_json, save_atomic
from fastlm.model.lora import (
    ALL,
    MAX_ALPHA,
    LoraConfig,
    check_plain,
    digest_of,
    linears_of,
    lora_of,
    put_lora,
    targets_of,
)

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

PREFIX = "base_model.model."  # PEFT's wrappers around the model
DIGEST = "base_digest"  # key in adapter_base.json
# What of PEFT's LoraConfig may have any value: it is read here, or changes nothing once trained
_READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "peft_type", "task_type"),
    *("base_model_name_or_path", "bias", "init_lora_weights", "layers_to_transform"),
    *("auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules"),
    *("layers_pattern", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
# Initialisations that change the base's weights as well: the adapter does not fit the original
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def save_adapter(model: "CausalLM", folder: str | Path, *, base: str | Path = "") -> None:
    """Write the adapters of a model (`fastlm.model.lora.add_lora`) as PEFT does; PEFT's
    ``PeftModel.from_pretrained(base_model, folder)`` loads them, and so does `load_adapter`.

    ``base`` is where the model without them was loaded from: a path, or a name such as
    ``model:smollm2``. ``CausalLM.from_pretrained(folder)`` looks for it there. Other files of an
    existing folder stay; a model in it is replaced.

    Raises InputError: a model without adapters, a folder that cannot be written.
    """
    adapters, lora, folder = lora_of(model), model.lora, Path(folder)
    if lora is None or not adapters:
        raise InputError("model: wanted one with adapters (add_lora), got one without")
    tensors = {}
    for name, module in adapters.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
    name, more = str(base), {DIGEST: lora.base_digest} if lora.base_digest else {}
    if name and not name.startswith("model:") and Path(name).exists():
        name = str(Path(name).resolve())  # PEFT takes a relative one from the working directory
        more[BASE_PATH] = os.path.relpath(name, folder.resolve())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": _target_modules(model, set(adapters)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }

    def write(part: Path) -> None:
        begin_folder(folder, part)
        write_json(part / ADAPTER_CONFIG, config)
        save_file(own_memory(tensors), part / ADAPTER, metadata={"format": "pt"})
        shutil.copymode(part / ADAPTER_CONFIG, part / ADAPTER)  # safetensors: only the owner
        (part / ADAPTER_BASE).unlink(missing_ok=True)  # not written through a hard link
        if more:
            write_json(part / ADAPTER_BASE, more)
        if ends := sorted(model.config.stop_ids):  # training may have added some to the base's
            (part / GENERATION).unlink(missing_ok=True)  # not written through a hard link
            write_json(part / GENERATION, {"eos_token_id": ends})

    make_folder(folder.parent)
    save_atomic(folder, write)


def _target_modules(model: "CausalLM", adapted: set[str]) -> list[str]:
    """The shortest names that stand for exactly these modules."""
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    plain = {name.removesuffix(".base_layer") for name in linears_of(model)}
    meant = {name for name in plain if name.rpartition(".")[2] in kinds}
    return kinds if meant == adapted else sorted(adapted)


def load_adapter(model: "CausalLM", folder: str | Path) -> "CausalLM":
    """Put the adapter in ``folder``, of fastlm or PEFT, on its base model, in place; return the
    model, whose other weights are frozen. It gets the end tokens that the adapter was trained with.

    Raises InputError: an adapter of another kind than LoRA, an option that fastlm does not have
    (DoRA, trained biases or modules, ranks per layer), an adapter of another base: the message
    names the module, shape or digest that differs.
    """
    check_plain(model)
    folder = Path(folder)
    config = _config(folder)
    here = digest_of(model)
    tensors = _tensors(folder / ADAPTER)
    file = folder / ADAPTER_BASE
    digest = read_json(file).get(DIGEST) if file.is_file() else None
    ends = _end_tokens(folder)
    lora = LoraConfig(
        config["r"],
        config["lora_alpha"],
        config.get("lora_dropout") or 0.0,
        bool(config.get("use_rslora")),
        digest or here,
    )
    linears = linears_of(model)
    adapters = {}
    for name, pair in _pairs(tensors, folder / ADAPTER).items():
        base = linears.get(name)
        if base is None:
            raise InputError(
                f"{folder}: {name}: is no linear layer of this model; the adapter is of"
                " another base"
            )
        if (rank := pair["lora_A"].shape[0]) != lora.r:
            raise InputError(f"{folder}: {name}: wanted rank {lora.r} by its config, got {rank}")
        shapes = {
            "lora_A": (lora.r, base.in_features),
            "lora_B": (base.out_features, lora.r),
        }
        for part, wanted in shapes.items():
            if tuple(pair[part].shape) != wanted:
                raise InputError(
                    f"{folder}: {name}.{part}: wanted {wanted} for this model, got"
                    f" {tuple(pair[part].shape)}; the adapter is of another base"
                )
        adapters[name] = pair["lora_A"].float(), pair["lora_B"].float()
    for name in _meant(model, config) - adapters.keys():
        raise InputError(
            f"{folder}: wanted an adapter of {name} by target_modules, got none; the adapter is of"
            " another base"
        )
    if digest and here and digest != here:
        raise InputError(
            f"{folder}: wanted the base model with the digest {digest}, got one with {here}: its"
            " weights are others"
        )
    if ends is not None:
        model.config.eos_token_id = ends
    return put_lora(model, adapters, lora)


def _end_tokens(folder: Path) -> int | list[int] | None:
    """The end tokens that an adapter of fastlm was trained with, or None."""
    file = folder / GENERATION
    ends = read_json(file).get("eos_token_id") if file.is_file() else None
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            raise InputError(f"{file}: eos_token_id: wanted token ids, got {ends!r:.60}")
    return ends


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked."""
    where = folder / ADAPTER_CONFIG
    config = read_json(where)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type: wanted LORA, got {kind!r:.60}")
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"{where}: task_type: wanted CAUSAL_LM, got {task!r:.60}")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias: wanted 'none', got {config['bias']!r:.60}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights: wanted one that leaves the base as it is, got"
            f" {init!r:.60}"
        )
    for key, value in config.items():
        if key not in _READ and value:
            raise InputError(f"{where}: {key}: fastlm's LoRA does not have it, got {value!r:.60}")
    rank, alpha, dropout = (config.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    if type(rank) is not int or rank < 1:
        raise InputError(f"{where}: r: wanted 1 or more, got {rank!r:.60}")
    if not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA:
        raise InputError(
            f"{where}: lora_alpha: wanted a positive number up to float32's, got {alpha!r:.60}"
        )
    share = 0 if dropout is None else dropout
    if type(share) not in (int, float) or not 0 <= share < 1:
        raise InputError(f"{where}: lora_dropout: wanted a share in [0, 1), got {dropout!r:.60}")
    return config


def _tensors(file: Path) -> dict[str, Tensor]:
    """The adapter's tensors."""
    if not file.is_file() and file.with_suffix(".bin").is_file():
        raise InputError(f"{file.parent}: wanted {ADAPTER}, got a pickle (convert it first)")
    with open_tensors(file) as opened:
        for name in opened.keys():
            if (got := opened.get_slice(name).get_dtype()) not in FLOATS:
                raise InputError(f"{file}: {name}: wanted one of {', '.join(FLOATS)}, got {got}")
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Module name -> its lora_A and lora_B."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if not (
            name.startswith(PREFIX)
            and name.endswith(".weight")
            and part in ("lora_A", "lora_B")
            and tensor.dim() == 2
        ):
            raise InputError(
                f"{file}: {name:.200}: wanted lora_A.weight and lora_B.weight of linear layers"
                f" under {PREFIX}, got this"
            )
        found.setdefault(module.removeprefix(PREFIX), {})[part] = tensor
    for module, pair in found.items():
        if len(pair) < 2:
            raise InputError(f"{file}: {module}: wanted lora_A and lora_B, got {min(pair)} alone")
    if not found:
        raise InputError(f"{file}: wanted the matrices of an adapter, got no tensor")
    return found


def _meant(model: "CausalLM", config: Mapping[str, Any]) -> set[str]:
    """The modules of this model that target_modules names; none where it is a regular expression
    or only some layers are adapted.
    """
    targets = config.get("target_modules")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    if targets == ALL:
        return set(linears_of(model))
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return set()
    known = [t for t in targets if any(n == t or n.endswith(f".{t}") for n in linears_of(model))]
    return set(targets_of(model, known)) if known else set()
