"""Small models of every family and option, as entries of config.json."""

# Odd on purpose: 3 key/value heads of 24, 97 tokens, sizes that are not multiples of a vector
SMALL = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits of order 1: with 0.02 a small model's are almost equal
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
    "qwen3": {"tie_word_embeddings": True, "pad_token_id": 45},
    "qwen3-yarn": {"rope_parameters": {**YARN, "rope_theta": 1e4, "beta_fast": 16.0}},
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 30,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 4, "num_hidden_layers": 7},
    "olmo2": {"pad_token_id": 45},
    "phi3": {"sliding_window": 7, "head_dim": None},
    "phi3-longrope": {
        "head_dim": None,
        "rope_parameters": {**LONG, "rope_theta": 1e4},
        "original_max_position_embeddings": 16,
    },
    "smollm3": {"num_hidden_layers": 5},
    "smollm3-window": {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 3},
}
