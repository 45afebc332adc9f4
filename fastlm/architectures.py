"""The decoder architectures whose checkpoints fastlm reads, and the tensors each must hold.

One table instead of building the model to see whether a file fits it: a checkpoint is refused by
its headers, before any weight is read.
"""

from collections.abc import Mapping
from typing import Any

from fastlm.errors import InputError

# model_type of config.json -> the class transformers loads it with
KNOWN = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
TIED = ("gemma2", "gemma3_text", "smollm3")  # tie_word_embeddings when config.json does not say
SANDWICH = ("gemma2", "gemma3_text")  # norms before and after both halves of a layer
MAX_SIZE = 2**31  # of any one dimension: a config beyond it is a mistake, not a model
MAX_LAYERS = 4096  # the deepest published decoders have under 200


def check_model_type(model_type: Any, where: Any) -> str:
    if not isinstance(model_type, str) or model_type not in KNOWN:
        known = ", ".join(KNOWN)
        raise InputError(f"{where}: model_type: wanted one of {known}, got {model_type!r:.60}")
    return model_type


def size(
    config: Mapping[str, Any],
    key: str,
    where: Any,
    default: int | None = None,
    limit: int = MAX_SIZE,
) -> int:
    """``config[key]`` (``default`` where it is missing or null), a positive integer below
    ``limit``.
    """
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < limit:
        raise InputError(
            f"{where}: {key}: wanted a positive integer below {limit}, got {value!r:.60}"
        )
    return value


def expected_shapes(config: Mapping[str, Any], where: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model that ``config`` (Hugging Face's config.json) describes -> its
    shape.

    ``lm_head.weight`` is left out when embeddings are tied. ``where`` names the config in errors.
    """
    kind = check_model_type(config.get("model_type"), where)
    hidden = size(config, "hidden_size", where)
    inner = size(config, "intermediate_size", where)
    heads = size(config, "num_attention_heads", where)
    kv_heads = size(config, "num_key_value_heads", where, heads)
    default = 256 if kind in SANDWICH else max(hidden // heads, 1)
    head_dim = size(config, "head_dim", where, default)
    vocab = size(config, "vocab_size", where)
    layers = size(config, "num_hidden_layers", where, limit=MAX_LAYERS)
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_key_value_heads: wanted a divisor of {heads} heads, got {kv_heads}"
        )
    q, kv = heads * head_dim, kv_heads * head_dim

    layer: dict[str, tuple[int, ...]] = {"self_attn.o_proj.weight": (hidden, q)}
    if kind == "phi3":
        layer["self_attn.qkv_proj.weight"] = (q + 2 * kv, hidden)
        layer["mlp.gate_up_proj.weight"] = (2 * inner, hidden)
    else:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.get("attention_bias") or kind == "qwen2":
                layer[f"self_attn.{name}_proj.bias"] = (rows,)
        if config.get("attention_bias"):
            layer["self_attn.o_proj.bias"] = (hidden,)
        layer["mlp.gate_proj.weight"] = layer["mlp.up_proj.weight"] = (inner, hidden)
        if config.get("mlp_bias"):
            layer["mlp.gate_proj.bias"] = layer["mlp.up_proj.bias"] = (inner,)
            layer["mlp.down_proj.bias"] = (hidden,)
    layer["mlp.down_proj.weight"] = (hidden, inner)
    if kind in ("qwen3", "gemma3_text"):  # per head
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (head_dim,)
    if kind == "olmo2":  # over all heads
        layer["self_attn.q_norm.weight"] = (q,)
        layer["self_attn.k_norm.weight"] = (kv,)
    else:
        layer["input_layernorm.weight"] = (hidden,)
    layer["post_attention_layernorm.weight"] = (hidden,)
    if kind in (*SANDWICH, "olmo2"):
        layer["post_feedforward_layernorm.weight"] = (hidden,)
    if kind in SANDWICH:
        layer["pre_feedforward_layernorm.weight"] = (hidden,)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", kind in TIED):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def check_tensors(
    found: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: Any
) -> None:
    """Refuse a checkpoint that lacks a tensor of the model or holds one of another shape.

    Tensors the model does not know (rotary tables of old files) are not looked at.
    """
    for name, wanted in expected_shapes(config, where).items():
        if name not in found:
            raise InputError(f"{where}: wanted a tensor {name} {wanted}, got none of that name")
        if found[name] != wanted:
            raise InputError(f"{where}: {name}: wanted {wanted} by the config, got {found[name]}")
