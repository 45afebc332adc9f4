"""Token by token: sampling, generation, the CPU step, the CUDA graph step."""
