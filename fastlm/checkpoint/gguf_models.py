"""Read a GGUF file as a Hugging Face checkpoint: config and tensor names, without llama.cpp's
changes.

llama.cpp's converter renames every tensor, reorders the rows of q and k for its interleaved RoPE
(architectures llama and smollm3), and adds one to Gemma's norm weights. Each change is reversed
here (the reordering on packed rows, too), so the model code needs only one layout.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.checkpoint import architectures
from fastlm.checkpoint.config import FAMILIES, MAX_LAYERS
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight

# general.architecture -> model_type
ARCHITECTURES = {
    **{name: name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2")},
    "gemma3": "gemma3_text",
    **{name: name for name in ("olmo2", "phi3", "smollm3")},
}
INTERLEAVED = ("llama", "mistral", "smollm3")  # q and k rows reordered
NORM_PLUS_ONE = ("gemma2", "gemma3_text")

SIZES = {  # key of the file -> entry of config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OVERRIDES = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3_text": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# A GGUF of Llama 3.1 or later stores the RoPE scaling only as its result, one divisor per
# frequency. All published models share these three values; the divisors are checked against them.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_name(name: str, model_type: str) -> str | None:
    """Return Hugging Face's name of a GGUF tensor, None if this architecture has no such tensor."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, suffix = match.groups()
        module = {**LAYER, **OVERRIDES.get(model_type, {})}.get(part)
        return module and f"model.layers.{layer}.{module}.{suffix}"
    if match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        module = TOP.get(match[1])
        return module and f"{module}.{match[2]}"
    return None


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """Return Hugging Face's config.json for the model in ``file``."""
    architecture = file.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise InputError(
            f"{file.path}: general.architecture: expected one of {names}, got {architecture!r:.60}"
        )

    def get(key: str, kind: type = int, default: Any = None) -> Any:
        key = f"{architecture}.{key}"
        value = file.get(key, kind, default)
        if kind is not float or value is None:
            return value
        if not math.isfinite(value):
            raise InputError(f"{file.path}: {key}: expected a finite number, got {value}")
        # the shortest decimal of the file's float32: 1e-05, as in the original config.json
        return float(str(np.float32(value)))

    def number(key: str) -> int:
        return file.require(f"{architecture}.{key}", int)

    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: expected a tensor token_embd.weight, got none")
    window = get("attention.sliding_window")
    epsilon = get("attention.layer_norm_rms_epsilon", float)
    model_type = ARCHITECTURES[architecture]
    if model_type == "llama" and window:
        model_type = "mistral"  # llama.cpp files Mistral under llama
    if model_type == "olmo2" and window:
        raise InputError(f"{file.path}: general.architecture: expected olmo2, got olmo3 (windowed)")
    sizes = {field: number(key) for key, field in SIZES.items()}
    hidden, heads = sizes["hidden_size"], number("attention.head_count")
    layers = sizes["num_hidden_layers"]
    if not 0 < layers <= MAX_LAYERS:  # before lists of that length are created
        raise InputError(
            f"{file.path}: {architecture}.block_count: expected 1 to {MAX_LAYERS}, got {layers}"
        )
    rotary = get("rope.dimension_count")
    head_dim = get("attention.key_length")
    if head_dim is None:
        head_dim = rotary if rotary and model_type != "phi3" else hidden // max(heads, 1)
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"{file.path}: head size: expected a positive even integer, got {head_dim}"
        )
    theta = get("rope.freq_base", float, 10000.0)
    if epsilon is None or not theta > 0:
        raise InputError(
            f"{file.path}: expected a {architecture}.attention.layer_norm_rms_epsilon and a "
            "positive"
            f" {architecture}.rope.freq_base, got {epsilon} and {theta}"
        )
    config: dict[str, Any] = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{key}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id", int)
    turns = [file.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eot", "eom")]
    if ends := [i for i in (config["eos_token_id"], *turns) if i is not None]:
        config["eos_token_id"] = ends[0] if len(set(ends)) == 1 else list(dict.fromkeys(ends))
    if rotary and rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if scaling := _rope_scaling(file, config, get):
        config["rope_scaling"] = scaling
        if original := scaling.get("original_max_position_embeddings"):
            config["original_max_position_embeddings"] = original
    if model_type == "qwen2":
        del config["attention_bias"]  # qwen2 is always biased; its config has no such key
    if model_type in ("mistral", "phi3"):
        config["sliding_window"] = window
    if model_type == "smollm3":  # llama.cpp hard-codes the interval
        config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(layers)]
    if model_type in NORM_PLUS_ONE:
        del config["hidden_act"]
        # the file has no query scale: llama.cpp recognises the 27B models by their layer count;
        # the last layer of each period is global
        of_27b, period = {"gemma2": (46, 2), "gemma3_text": (62, 6)}[model_type]
        scale = hidden // max(heads, 1) if layers == of_27b else head_dim
        kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": number("attention.sliding_window"),
            "query_pre_attn_scalar": scale,
            "layer_types": (kinds * layers)[:layers],
            "attn_logit_softcapping": get("attn_logit_softcapping", float),
            "final_logit_softcapping": get("final_logit_softcapping", float),
        }
        if model_type == "gemma3_text":
            config["rope_local_base_freq"] = 10000.0
    return config


def _rope_scaling(file: GGUFFile, config: dict[str, Any], get: Any) -> dict[str, Any] | None:
    kind, factor = get("rope.scaling.type", str, "none"), get("rope.scaling.factor", float)
    original = get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in file.tensors:
        tables = {
            f"{length}_factor": _floats(file, f"rope_factors_{length}.weight").tolist()
            for length in ("long", "short")
        }
        return {"rope_type": "longrope", "original_max_position_embeddings": original, **tables}
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, config)
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "longrope"):
        raise InputError(
            f"{file.path}: rope.scaling.type: expected none, linear, yarn or longrope, "
            f"got {kind!r:.60}"
        )
    return None


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    if name not in file.tensors or isinstance(tensor := file.load(name), QuantizedWeight):
        raise InputError(f"{file.path}: {name}: expected an unquantized tensor, got none")
    return tensor.double().flatten().numpy()


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    divisors = _floats(file, "rope_freqs.weight")
    half = config["head_dim"] // 2
    factor = float(divisors.max(initial=1.0))
    expected = llama3_divisors(config["rope_theta"], half, factor)
    # the file's divisors were computed in float32
    fits = divisors.shape == expected.shape and np.isfinite(divisors).all()
    if not fits or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{file.path}: rope_freqs.weight: expected Llama 3's scaling, got another")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def llama3_divisors(theta: float, half: int, factor: float) -> np.ndarray:
    """Return the divisors of Llama 3's scaling for ``half`` frequencies."""
    low, high, original = LLAMA3_ROPE.values()
    # turns of each frequency over the original context; those with few turns are stretched
    turns = original * theta ** -(np.arange(half) / half) / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (blend + (1 - blend) / factor)


def swap_rows(weight: Any, heads: int, *, interleave: bool) -> Any:
    """Reorder rows (head, pair, 2), the order of interleaved RoPE, to (head, 2, pair); with
    ``interleave`` in reverse.
    """
    shape = (heads, 2, -1) if interleave else (heads, -1, 2)
    order = torch.arange(weight.shape[0]).view(shape).transpose(1, 2).reshape(-1)
    if isinstance(weight, QuantizedWeight):
        zeros = None if weight.zeros is None else weight.zeros[order]
        return replace(weight, qdata=weight.qdata[order], scales=weight.scales[order], zeros=zeros)
    return weight.detach()[order]


def load_gguf(file: GGUFFile) -> tuple[dict[str, Any], Iterator[tuple[str, Any]]]:
    """Return config.json's content, and the tensors one by one under Hugging Face's names."""
    config = gguf_config(file)
    kind = config["model_type"]
    names: dict[str, str] = {}
    targets = set()
    for name in file.tensors:
        if name in ROPE_TABLES:
            continue
        if (target := hf_name(name, kind)) is None:
            raise InputError(f"{file.path}: {name}: expected a tensor of {kind}, got one it lacks")
        if target in targets:
            raise InputError(f"{file.path}: {name}: expected one tensor for {target}, got two")
        names[name] = target
        targets.add(target)
    shapes = {target: file.tensors[name].shape for name, target in names.items()}
    architectures.check_tensors(shapes, architectures.parse_config(config, file.path), file.path)

    def tensors() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        for name, target in names.items():
            weight: Any = file.load(name)
            if file.metadata["general.architecture"] in INTERLEAVED:
                if ".attn_q." in name:
                    weight = swap_rows(weight, config["num_attention_heads"], interleave=False)
                elif ".attn_k." in name:
                    weight = swap_rows(weight, config["num_key_value_heads"], interleave=False)
            if kind in NORM_PLUS_ONE and name.endswith("norm.weight"):
                weight = weight - 1  # norms are never quantized
            yield target, weight

    return config, tensors()
