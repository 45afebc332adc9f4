"""Small models of transformers' families, plain and patched, for the tests of `fastlm.patch`."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

import fastlm

transformers.logging.set_verbosity_error()

WINDOW = 8  # shorter than the sequences, so that it has an effect
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, **IDS,
}  # fmt: skip
_NEOX = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0,
    "attn_pdrop": 0,
    "embd_pdrop": 0,
}
_ALL = {"rope": 2, "attention": 2, "glu": 2, "linear_cross_entropy": 1}
# family -> (config, what `patch` finds in it, decoder layers that fuse addition and norm)
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), {**_ALL, "rms_norm": 5}, 2),
    "mistral": (MistralConfig(**SMALL, sliding_window=WINDOW), {**_ALL, "rms_norm": 5}, 2),
    "qwen2": (
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        {**_ALL, "rms_norm": 5},
        2,
    ),
    "qwen3": (Qwen3Config(**SMALL), {**_ALL, "rms_norm": 9}, 2),
    "smollm3": (SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), {**_ALL, "rms_norm": 5}, 2),
    "gemma": (GemmaConfig(**SMALL), {**_ALL, "rms_norm": 5}, 2),
    "gemma2": (
        Gemma2Config(
            **SMALL, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        ),
        {**_ALL, "rms_norm": 9},
        2,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SMALL, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
        ),
        {**_ALL, "rms_norm": 13},
        2,
    ),
    "phi3": (
        Phi3Config(**SMALL, partial_rotary_factor=0.5, sliding_window=WINDOW),
        {**_ALL, "rms_norm": 5},
        2,
    ),
    "phi4": (  # uses Phi-3's classes
        Phi3Config(**SMALL, partial_rotary_factor=0.75, tie_word_embeddings=True),
        {**_ALL, "rms_norm": 5},
        2,
    ),
    "olmo2": (Olmo2Config(**SMALL), {**_ALL, "rms_norm": 9}, 0),
    "granite": (
        GraniteConfig(**SMALL, logits_scaling=3.0, residual_multiplier=0.5),
        {**_ALL, "rms_norm": 5},
        0,
    ),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.25), {**_ALL, "layer_norm": 3}, 0),
    "gpt2": (
        GPT2Config(vocab_size=99, **_GPT2, **IDS),
        {"layer_norm": 5, "attention": 2, "linear_cross_entropy": 1},
        0,
    ),
    "neox": (
        GPTNeoXConfig(**_NEOX, rotary_pct=0.25),
        {"layer_norm": 5, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
        0,
    ),
    "mixtral": (
        MixtralConfig(**SMALL, num_local_experts=2),
        {"rope": 2, "attention": 2, "rms_norm": 5, "linear_cross_entropy": 1},
        2,
    ),
    "qwen2_moe": (  # a dense layer, then experts next to a shared one, which is a dense MLP
        Qwen2MoeConfig(
            **SMALL, decoder_sparse_step=2, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=32, shared_expert_intermediate_size=48,
        ),
        {**_ALL, "rms_norm": 5},
        2,
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
# sliding windows, softcaps, offsets and sandwich norms, LayerNorm: every path of the mask
few_families = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])


def model_of(family="llama", dtype=torch.float32, **changes):
    config = copy.deepcopy(FAMILIES[family][0])
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "embed" in name or "wte" in name:
                p.add_(0.3 * torch.randn_like(p))  # no norm weight is 1, no bias 0, logits differ
    return model.to(dtype)


def pair(family="llama", *, ops=None, **options):
    """Return the same model twice; the second one is patched."""
    plain = model_of(family, **options)
    return plain, fastlm.patch(copy.deepcopy(plain), ops=ops)


def linears(model):
    """Count what `patch` finds in addition to `FAMILIES`: linear layers except the head."""
    count = sum(type(m) is nn.Linear for m in model.modules()) - 1
    return {"linear": count} if count else {}


def tokens(batch=2, length=20):
    return torch.randint(3, 99, (batch, length))


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        scale = a[name].abs().max().clamp_min(1e-6)
        error = (a[name] - b[name]).abs().max() / scale
        assert error < tolerance, f"{name}: {error:.1e}"
