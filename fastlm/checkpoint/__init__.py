"""Models on disk: Hugging Face folders, GGUF files."""
