"""Read and write model files: Hugging Face folders, GGUF files, fastlm's quantized folders, and
checksummed tensors for resuming after a crash.

Tensors are read one at a time, after every header, name and shape has been checked: a bad file
costs an error line and no memory. Pickles (``pytorch_model.bin``) are not read, because loading one
runs its author's code. Every file is written under a temporary name next to the final one, synced
and then renamed.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlm.checkpoint import awq, compressed_tensors, fastlm_format, fp4, gptq
from fastlm.checkpoint.architectures import check_tensors, expected_shapes, parse_config
from fastlm.checkpoint.fastlm_format import describe_layer
from fastlm.checkpoint.gguf_file import open_gguf
from fastlm.checkpoint.gguf_models import load_gguf
from fastlm.checkpoint.tensor_folder import FLOATS, INDEX, SINGLE, Quantization, TensorFolder
from fastlm.errors import InputError
from fastlm.files import make_folder, open_regular, read_json, reason, save_atomic
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.pipeline.run_folder import ADAPTER_CONFIG, CONFIG, is_adapter, locate_model

GENERATION = "generation_config.json"
MODELOPT = "hf_quant_config.json"  # of ModelOpt's exports; newer ones also have it in config.json
# a LoRA adapter in PEFT's format (`fastlm.model.adapter`)
ADAPTER = "adapter_model.safetensors"
ADAPTER_BASE = "adapter_base.json"
BASE_PATH = "base_path"  # key in ADAPTER_BASE: the base's path relative to the adapter's folder
MODEL_FILES = (
    *(CONFIG, SINGLE, INDEX, "model-*-of-*.safetensors", MODELOPT),
    *(ADAPTER_CONFIG, ADAPTER, ADAPTER_BASE),
)
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"  # of `save_tensors`
State = Iterator[tuple[str, Tensor | QuantizedWeight]]


# writing


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def link_other_files(folder: Path, part: Path) -> None:
    """Create ``part`` with hard links to all files in ``folder`` but the model, such as its
    tokenizer.
    """
    if not folder.is_dir():
        part.mkdir()
        return

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copy2(source, target)

    model_files = shutil.ignore_patterns(*MODEL_FILES)

    def ignore(path: str, names: list[str]) -> set[str]:
        return model_files(path, names) if Path(path) == folder else set()  # keep other models

    shutil.copytree(folder, part, symlinks=True, ignore=ignore, copy_function=link)


def unshare_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors that share no memory, as safetensors needs them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def save_hf(
    folder: str | Path,
    config_dict: Mapping[str, Any],
    state: Mapping[str, Tensor | QuantizedWeight],
    *,
    max_shard_bytes: int = 5 * 2**30,
    quantization_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder: config.json and model.safetensors, or shards of at most
    ``max_shard_bytes`` (a single larger tensor gets its own) with their index.

    A QuantizedWeight named ``X.weight`` is stored as ``X.qdata``, ``X.scales`` and ``X.zeros``, and
    config.json gets a ``quantization_config`` unless it has one. The content of this entry is
    nested under ``fastlm``, with no ``quant_method`` next to it: transformers refuses such a file;
    one with an unknown method it would open and fill with random weights. Other files of an
    existing folder stay. The folder is replaced atomically (see ``save_atomic``).
    ``quantization_config``: another program's entry for the tensors of ``state``, written
    unchanged.
    """
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    folder = Path(folder)
    config = dict(config_dict)
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    for name, value in state.items():
        if isinstance(value, QuantizedWeight):
            module = name.removesuffix(".weight")
            quantized[module] = value
            parts = zip(fastlm_format.PARTS, (value.qdata, value.scales, value.zeros))
            tensors |= {f"{module}.{part}": t for part, t in parts if t is not None}
        else:
            tensors[name] = value
    if (config.get("quantization_config") or {}).get("quant_method") != "fastlm":
        config.pop("quantization_config", None)  # null, or the entry of the source file
    if quantized and "quantization_config" not in config:
        config["quantization_config"] = _describe(quantized)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    elif "quantization_config" in config:
        config["quantization_config"] = {"fastlm": config["quantization_config"]}

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes

    def write(part: Path) -> None:
        link_other_files(folder, part)
        weight_map = {}
        for index, shard in enumerate(shards):
            file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            save_file(unshare_tensors(shard), part / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(part / CONFIG, config)
        for file in set(
            weight_map.values()
        ):  # safetensors creates files that only the owner can read
            shutil.copymode(part / CONFIG, part / file)

    make_folder(folder.parent)
    save_atomic(folder, write)


def _describe(quantized: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """Return the quantization_config of these weights. If they differ, the format is "mixed" and
    the group size None.
    """
    modules = {
        name: describe_layer("embedding" if name.endswith("embed_tokens") else "linear", weight)
        for name, weight in quantized.items()
    }
    formats = {f"w{w.bits}a16" for w in quantized.values()}
    groups = {w.group_size for w in quantized.values()}
    return {
        "quant_method": "fastlm",
        "format": formats.pop() if len(formats) == 1 else "mixed",
        "group_size": groups.pop() if len(groups) == 1 else None,
        "modules": modules,
    }


# reading


def load_state(path: str | Path, *, keep_quantized: bool = True) -> tuple[dict[str, Any], State]:
    """Return ``(config, tensors)``: config.json's content, and (name, tensor) one by one under
    Hugging Face's names, from a Hugging Face folder, a fastlm run folder or a .gguf file.

    Quantized weights are QuantizedWeight, or float32 with ``keep_quantized=False``. A tied
    ``lm_head.weight`` is left out. Everything is checked before the first tensor is read.

    Raises InputError: an unreadable or truncated file, a missing shard, tensor or config entry, an
    unknown architecture, a tensor with another shape than the config's.
    """
    path = locate_model(Path(path))
    if path.suffix == ".gguf":
        config, tensors = load_gguf(open_gguf(path))
    else:
        config, tensors = _load_folder(path)
    if not keep_quantized:
        tensors = ((n, w.dequantize() if isinstance(w, QuantizedWeight) else w) for n, w in tensors)
    return config, tensors


def find_base_model(folder: Path) -> str:
    """Return the base model of the adapter in ``folder``: a path that exists, or ``model:NAME``. If
    the recorded path does not exist, the path relative to the adapter is used: a run may have
    moved.
    """
    location = f"{folder / ADAPTER_CONFIG}: base_model_name_or_path"
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if isinstance(name, str) and name.startswith("model:"):
        return name
    if not isinstance(name, str) or not name or not Path(name).exists():
        file = folder / ADAPTER_BASE
        relative_path = read_json(file).get(BASE_PATH) if file.is_file() else None
        if not isinstance(relative_path, str) or not (base := folder / relative_path).exists():
            raise InputError(
                f"{location}: expected a model on this machine, got {name!r:.200}; name one"
                " (fastlm merge --base), or use load_adapter"
            )
        name = str(base.resolve())
    if is_adapter(locate_model(Path(name))):
        raise InputError(
            f"{location}: expected a full model, got an adapter, {name!r:.200}; merge it first"
        )
    return name


def _load_folder(folder: Path) -> tuple[dict[str, Any], State]:
    config = read_json(folder / CONFIG)
    if (folder / GENERATION).is_file():  # its end tokens take precedence, as in transformers
        ends = read_json(folder / GENERATION).get("eos_token_id")
        config |= {} if ends is None else {"eos_token_id": ends}
    if config.get("quantization_config") is None and (folder / MODELOPT).is_file():
        config["quantization_config"] = fp4.read_modelopt_config(folder / MODELOPT)
    model = parse_config(config, folder / CONFIG)
    tensors = TensorFolder(folder)
    packed = _read_quantization(config, tensors, f"{folder / CONFIG}: quantization_config")
    packed_names = packed.unused | {
        name for w in packed.weights.values() for name in w.parts.values()
    }
    expected = expected_shapes(model)
    # GPTQ's writers add biases of zeros to layers that have none
    extra_biases = {n for n in tensors.headers if n.endswith(".bias") and n not in expected}
    extra_biases &= {f"{name.removesuffix('.weight')}.bias" for name in packed.weights}
    plain = tensors.headers.keys() - packed_names
    for name in plain:
        header = tensors.headers[name]
        if header.dtype not in FLOATS:
            raise InputError(
                f"{folder / header.file}: {name}: expected one of {', '.join(FLOATS)},"
                f" got {header.dtype}"
            )
    shapes = {name: tensors.headers[name].shape for name in plain - packed.weights.keys()}
    shapes |= {name: weight.shape for name, weight in packed.weights.items()}
    check_tensors(shapes, model, folder)
    drop = {"lm_head.weight"} if model.tie_word_embeddings else set()

    def state() -> State:
        for name, tensor in tensors.read_tensors(plain - drop):
            if name not in extra_biases or bool((tensor != 0).any()):
                yield name, tensor
        for name, weight in packed.weights.items():
            if name not in drop:
                yield name, tensors.load(name, weight)

    return config, state()


def _read_quantization(
    config: dict[str, Any], tensors: TensorFolder, location: str
) -> Quantization:
    """Read the quantized weights according to ``config``. Another program's entry is replaced by
    ``{"quant_method", "description", "modules"}`` according to the tensors.
    """
    entry = config.get("quantization_config")
    if isinstance(entry, dict) and "fastlm" in entry:  # from version 0.2 on
        entry = config["quantization_config"] = entry["fastlm"]
    if entry is None:
        return Quantization({})
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(method, str) or method not in READERS:
        raise InputError(
            f"{location}: expected quant_method {', '.join(READERS)}, got {method!r:.60}"
        )
    quantization = READERS[method](entry, tensors, location)
    if not quantization.weights and method != "fastlm":
        raise InputError(f"{location}: expected tensors of {method}, got none")
    if quantization.warning:
        warnings.warn(quantization.warning, stacklevel=2)
    if method != "fastlm":
        modules = {name: {"act_bits": bits} for name, bits in quantization.act_bits.items()}
        config["quantization_config"] = {
            "quant_method": method, "description": quantization.description, "modules": modules,
        }  # fmt: skip
    return quantization


def _auto_round(config: dict[str, Any], tensors: TensorFolder, location: str) -> Quantization:
    """Read AutoRound's checkpoints, which have GPTQ's or AWQ's packing."""
    packing = config.get("packing_format", "auto_round:auto_gptq")
    return (awq if "awq" in str(packing) else gptq).read(config, tensors, location)


READERS: dict[str, Callable[[dict[str, Any], TensorFolder, str], Quantization]] = {
    "fastlm": fastlm_format.read,
    "gptq": gptq.read,
    "auto-round": _auto_round,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "modelopt": fp4.read_modelopt,
}


# tensors with a checksum


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write ``tensors`` and JSON ``metadata`` as a folder that ``load_tensors`` verifies."""

    def write(part: Path) -> None:
        part.mkdir()
        data = part / TENSORS
        save_file(unshare_tensors(tensors), data)
        manifest = {"bytes": data.stat().st_size, "sha256": _sha256(data)}
        write_json(part / MANIFEST, {**manifest, "metadata": metadata or {}})

    save_atomic(path, write)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return ``(tensors, metadata)`` of a ``save_tensors`` folder; InputError if a byte has
    changed.
    """
    path = Path(path)
    manifest = read_json(path / MANIFEST)
    data = path / TENSORS
    try:
        actual = _sha256(data)
        if actual != manifest.get("sha256"):
            expected = str(manifest.get("sha256"))
            raise InputError(
                f"{data}: corrupt: expected sha256 {expected:.12}..., got {actual:.12}..."
            )
        return load_file(data), manifest.get("metadata") or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{data}: cannot be read: {reason(error)}") from error


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
