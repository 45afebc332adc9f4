"""Write a model and its tokenizer as a GGUF file that llama.cpp runs: the reverse of
`fastlm.checkpoint.gguf_models`.

That module reads the file back before it is renamed to its final name. Traits that GGUF or
llama.cpp cannot express (biases in the MLP, another pattern of windows) are differences there and
are refused.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from torch import Tensor

from fastlm.checkpoint.config import ModelConfig
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.checkpoint.gguf_models import (
    ARCHITECTURES,
    INTERLEAVED,
    LAYER,
    LLAMA3_ROPE,
    NORM_PLUS_ONE,
    OVERRIDES,
    SIZES,
    TOP,
    gguf_config,
    llama3_divisors,
    swap_rows,
)
from fastlm.errors import InputError
from fastlm.export.gguf_encode import block_format, encode_tensor, row_bytes
from fastlm.export.gguf_vocab_write import gguf_vocabulary
from fastlm.files import make_folder, save_atomic
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant.targets import check_layers
from fastlm.tokenizer.tokenizer import Tokenizer

State = Mapping[str, Tensor | QuantizedWeight]
# fields that a file does not store and llama.cpp does not use
NOT_STORED = (
    *("extra", "initializer_range", "attention_dropout", "max_window_layers"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_sliding_window"),
)
FILE_TYPES = {  # general.file_type, by the format of most weights
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32,
}  # fmt: skip


def save_gguf(
    path: str | Path, config: ModelConfig, state: State, tokenizer: Tokenizer | None, name: str
) -> dict[str, Any]:
    """Write ``path``. Returns {"formats": format -> weights, "rounded_scales": number of
    scales that float16 rounds}.

    InputError, before anything is written: a weight that no block format can store
    (`block_format`), a tokenizer with a split pattern that llama.cpp lacks; afterwards: a config
    that GGUF cannot express.
    """
    architecture = _architecture(config)
    kinds = check_gguf(config, state)
    metadata = _metadata(config, architecture)
    if tokenizer is not None:
        metadata |= gguf_vocabulary(tokenizer, config)
    names = {key: gguf_name(key, config) for key in state}
    tables = _rope_tables(config)
    formats = Counter(kinds[key].name for key in state if len(state[key].shape) == 2)
    main_format = formats.most_common(1)[0][0]
    rounded = 0

    def write(part: Path) -> None:
        nonlocal rounded
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[main_format])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            add_value(writer, key, value)
        for key, table in tables.items():
            writer.add_tensor_info(key, table.shape, table.dtype, table.nbytes)
        for key, weight in state.items():
            _add_tensor_info(writer, names[key], kinds[key], tuple(weight.shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for table in tables.values():
            writer.write_tensor_data(table)
        for key, weight in state.items():
            data, count = encode_tensor(key, _as_llama_cpp(key, weight, config, architecture))
            rounded += count
            writer.write_tensor_data(data)
        writer.close()
        _check(part, path, config)

    make_folder(Path(path).parent)
    save_atomic(path, write)
    return {"formats": dict(formats), "rounded_scales": rounded}


def check_gguf(config: ModelConfig, state: State) -> dict[str, GGMLQuantizationType]:
    """Return the format of each weight from its shape and groups. InputError: a weight that no
    block format can store, RoPE that GGUF lacks.
    """
    _metadata(config, _architecture(config))
    widths = {key: weight.shape[-1] for key, weight in state.items()}
    return check_layers(widths, lambda key: block_format(key, state[key]))


def _architecture(config: ModelConfig) -> str:
    if config.model_type == "mistral":
        return "llama"  # llama.cpp files Mistral under llama
    return next(name for name, kind in ARCHITECTURES.items() if kind == config.model_type)


def gguf_name(name: str, config: ModelConfig) -> str:
    """Return llama.cpp's name of a tensor of the model."""
    module, _, suffix = name.rpartition(".")
    for short, long in TOP.items():
        if module == long:
            return f"{short}.{suffix}"
    _, _, layer, part = module.split(".", 3)
    table = {**LAYER, **OVERRIDES.get(config.model_type, {})}
    if config.family.norms == "pre":  # two of llama.cpp's names are one of Hugging Face's
        del table["post_attention_norm"]
    elif table["ffn_norm"] == "post_attention_layernorm":
        del table["ffn_norm"]
    return next(f"blk.{layer}.{short}.{suffix}" for short, long in table.items() if long == part)


def _metadata(config: ModelConfig, architecture: str) -> dict[str, Any]:
    nested = "full_attention" in config.rope_parameters
    rope = config.rope_parameters["full_attention"] if nested else config.rope_parameters
    rotary = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    values: dict[str, Any] = {
        **{key: getattr(config, field) for key, field in SIZES.items()},
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window if _windowed(config) else None,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.dimension_count": rotary,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings")
        original = original or config.original_max_position_embeddings
        values["rope.scaling.original_context_length"] = original
    if kind not in ("default", "linear", "yarn", "longrope", "llama3"):
        raise InputError(f"rope_type: expected one that GGUF has, got {kind}")
    if kind == "llama3" and any(rope[key] != value for key, value in LLAMA3_ROPE.items()):
        raise InputError(f"rope_parameters: expected Llama 3's {LLAMA3_ROPE} for GGUF, got {rope}")
    return {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def _rope_tables(config: ModelConfig) -> dict[str, np.ndarray]:
    rope, tables = config.rope_parameters, {}
    if rope.get("rope_type") == "llama3":
        divisors = llama3_divisors(rope["rope_theta"], config.head_dim // 2, rope["factor"])
        tables = {"rope_freqs.weight": divisors}
    if rope.get("rope_type") == "longrope":
        lengths = ("long", "short")
        tables = {f"rope_factors_{n}.weight": rope[f"{n}_factor"] for n in lengths}
    return {name: np.array(table, np.float32) for name, table in tables.items()}


def _as_llama_cpp(name: str, weight: Any, config: ModelConfig, architecture: str) -> Any:
    """Reorder the rows of q and k for interleaved RoPE, and add one to Gemma's norms."""
    if architecture in INTERLEAVED and ".self_attn.q_proj." in name:
        return swap_rows(weight, config.num_attention_heads, interleave=True)
    if architecture in INTERLEAVED and ".self_attn.k_proj." in name:
        return swap_rows(weight, config.num_key_value_heads, interleave=True)
    if config.model_type in NORM_PLUS_ONE and name.endswith("norm.weight"):
        return weight.detach().float() + 1  # norms are never quantized
    return weight


def _add_tensor_info(
    writer: gguf.GGUFWriter, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> None:
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    dtype, raw = np.dtype(plain.get(kind, np.uint8)), None if kind in plain else kind
    if raw is not None:
        shape = (shape[0], row_bytes(kind, shape[1]))
    writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a key with the type of `value`: whole numbers are uint32, floats float32."""
    kind = gguf.GGUFValueType.get_type(value)
    unsigned = kind is gguf.GGUFValueType.INT32
    writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if unsigned else kind)


def _check(part: Path, path: str | Path, config: ModelConfig) -> None:
    """Refuse a model that the file describes differently."""
    stored = ModelConfig.from_dict(gguf_config(GGUFFile(part)))
    skipped = {*NOT_STORED, *(() if _windowed(config) else ("sliding_window",))}
    if config.model_type == "mistral":  # without windows it is a llama
        skipped.add("model_type")
    for field in fields(ModelConfig):
        expected, actual = (_single_precision(getattr(c, field.name)) for c in (config, stored))
        if field.name == "rope_parameters" and expected.get("rope_type") == "longrope":
            expected.pop("original_max_position_embeddings", None)  # a separate field
            actual.pop("original_max_position_embeddings", None)
        if field.name not in skipped and expected != actual:
            raise InputError(
                f"{path}: {field.name}: expected a model that GGUF can describe, got"
                f" {getattr(config, field.name)!r:.80} (llama.cpp would read"
                f" {getattr(stored, field.name)!r:.80})"
            )


def _windowed(config: ModelConfig) -> bool:
    return "sliding_attention" in config.layer_types


def _single_precision(value: Any) -> Any:
    """Convert floats to the file's precision, also inside dicts and lists."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return np.float32(value)
    if isinstance(value, dict):
        return {key: _single_precision(inner) for key, inner in value.items() if inner is not None}
    return [_single_precision(inner) for inner in value] if isinstance(value, list) else value
