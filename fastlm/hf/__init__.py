"""Hugging Face models on fastlm's kernels."""
