"""CausalLM against transformers: random small models of every family, and SmolLM2's weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from tolerance import ULP

from fastlm.config import FAMILIES, ModelConfig
from fastlm.errors import InputError
from fastlm.model import CausalLM

transformers = pytest.importorskip("transformers")

# Odd on purpose: 3 key/value heads of 24, 97 tokens, sizes that are no multiple of a vector
SMALL = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits of order 1: with 0.02 a small model's are all alike
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(5)],
    "long_factor": [1.5 + 0.7 * i for i in range(5)],
}
CASES = {
    "llama": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "llama-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": {**YARN, "rope_theta": 1e3}},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3-yarn": {"rope_parameters": {**YARN, "rope_theta": 1e4, "beta_fast": 16.0}},
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 30,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 4, "num_hidden_layers": 7},
    "olmo2": {},
    "phi3": {"sliding_window": 7, "head_dim": None},
    "phi3-longrope": {
        "head_dim": None,
        "rope_parameters": {**LONG, "rope_theta": 1e4},
        "original_max_position_embeddings": 16,
    },
    "smollm3": {"num_hidden_layers": 5},
    "smollm3-window": {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 3},
}


def hf_config(case, **changes):
    options = {**SMALL, **CASES[case], **changes}
    options = {k: v for k, v in options.items() if k != "head_dim" or v is not None}
    model_type = case.split("-")[0]
    if FAMILIES[model_type].norms == "sandwich" and "hidden_act" in options:
        options["hidden_activation"] = options.pop("hidden_act")
    return transformers.AutoConfig.for_model(
        model_type, attn_implementation="eager", **options
    )


def pair(case, dtype=torch.float32, **changes):
    """The same random model in transformers and here, in eval mode."""
    torch.manual_seed(1)
    config = hf_config(case, **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a mix-up
                p.add_(torch.randn_like(p) * 0.3)
    ours = CausalLM(ModelConfig.from_dict(config.to_dict())).to(dtype).eval()
    state = {k: v for k, v in theirs.state_dict().items()}
    if ours.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def ids_of(rows=2, length=20, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (rows, length), generator=g)


def assert_same(ours, theirs, dtype, what):
    """Both sides round each of a few hundred operations in another order: 2^7 units in the last place of the largest
    value (1.5e-5 in float32). A wrong constant or a mixed-up weight is beyond 1e-3."""
    scale = theirs.abs().max().item()
    worst = (ours - theirs).abs().max().item()
    assert worst <= 2**7 * ULP[dtype] * max(scale, 1e-30), f"{what}: {worst:.2e} of {scale:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case):
    theirs, ours = pair(case)
    ids = ids_of()
    with torch.no_grad():
        assert_same(ours(ids).logits, theirs(ids).logits, torch.float32, "logits")
    labels = ids.clone()
    labels[0, :5] = -100
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    out = ours(ids, labels=labels)
    assert out.logits is None and out.loss.dtype == torch.float32
    out.loss.backward()
    assert_same(out.loss, expected, torch.float32, "loss")
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert_same(p.grad, wanted[name].grad, torch.float32, f"gradient of {name}")
