"""Write a model in another program's format: GGUF for llama.cpp, compressed-tensors for vLLM."""
