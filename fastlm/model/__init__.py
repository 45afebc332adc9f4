"""The decoder: configuration, layers, `causal_lm.CausalLM`."""
