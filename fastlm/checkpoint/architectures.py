"""The tensors that a checkpoint of a given `ModelConfig` must contain.

With this table a checkpoint is refused from its headers, before any weight is read and without
building the model.
"""

from collections.abc import Mapping
from typing import Any

from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError


def parse_config(config: Mapping[str, Any], location: Any) -> ModelConfig:
    """Check the config.json at ``where``, which must state its model_type, and return it."""
    try:
        return ModelConfig.from_dict({"model_type": None, **config})
    except InputError as error:
        raise InputError(f"{location}: {error}") from None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name -> shape of every tensor of the model. ``lm_head.weight`` is left out
    when embeddings are tied.
    """
    family = config.family
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim

    layer: dict[str, tuple[int, ...]] = {"self_attn.o_proj.weight": (hidden, q)}
    if family.fused_projections:
        layer["self_attn.qkv_proj.weight"] = (q + 2 * kv, hidden)
        layer["mlp.gate_up_proj.weight"] = (2 * inner, hidden)
    else:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.attention_bias or family.qkv_bias:
                layer[f"self_attn.{name}_proj.bias"] = (rows,)
        if config.attention_bias:
            layer["self_attn.o_proj.bias"] = (hidden,)
        layer["mlp.gate_proj.weight"] = layer["mlp.up_proj.weight"] = (inner, hidden)
        if config.mlp_bias:
            layer["mlp.gate_proj.bias"] = layer["mlp.up_proj.bias"] = (inner,)
            layer["mlp.down_proj.bias"] = (hidden,)
    layer["mlp.down_proj.weight"] = (hidden, inner)
    if family.qk_norm is not None:
        per_head = family.qk_norm == "head"
        layer["self_attn.q_norm.weight"] = (config.head_dim if per_head else q,)
        layer["self_attn.k_norm.weight"] = (config.head_dim if per_head else kv,)
    norms = {
        "pre": ("input", "post_attention"),
        "post": ("post_attention", "post_feedforward"),
        "sandwich": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    }
    for name in norms[family.norms]:
        layer[f"{name}_layernorm.weight"] = (hidden,)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, location: Any
) -> None:
    """Refuse a checkpoint that lacks a tensor of the model or has one of another shape.

    Tensors that the model does not have (rotary tables of old files) are ignored.
    """
    for name, expected in expected_shapes(config).items():
        if name not in shapes:
            raise InputError(
                f"{location}: expected a tensor {name} {expected}, got none of that name"
            )
        if shapes[name] != expected:
            raise InputError(
                f"{location}: {name}: expected {expected} by the config, got {shapes[name]}"
            )
