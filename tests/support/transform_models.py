"""A small fastlm model, or a patched one of transformers, for tests of full models."""

import torch
from patch_models import model_of

import fastlm

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def model_and_ids(patched):
    ids = torch.randint(3, 99, (2, 12))
    if patched:
        return fastlm.patch(model_of("llama")), ids
    return fastlm.CausalLM(fastlm.ModelConfig(**CONFIG), seed=0), ids
