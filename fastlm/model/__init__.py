"""The decoder: layers, `causal_lm.CausalLM`, its checkpoints, and how one step of it runs."""
