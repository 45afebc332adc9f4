"""Find the tokenizer that is stored with a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.checkpoint.architectures import parse_config
from fastlm.checkpoint.folder import find_base_model
from fastlm.errors import InputError
from fastlm.pipeline.run_folder import is_adapter, locate_model
from fastlm.sources.packages import model_path
from fastlm.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: str | Path, config: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer that is stored with a model, in its run folder, or with an adapter's base.
    InputError: the tokenizer has ids that the model's embedding lacks."""
    model = locate_model(model_path(path))
    tokenizer_path = _find_tokenizer(path) or model
    tokenizer = Tokenizer.load(tokenizer_path)
    vocab = parse_config(config, model).vocab_size
    if tokenizer.vocab_size > vocab:
        raise InputError(
            f"{tokenizer_path}: expected a tokenizer of at most {vocab} ids (the model's"
            f" embedding), got {tokenizer.vocab_size}"
        )
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    """Return whether `load_tokenizer` finds a tokenizer."""
    return _find_tokenizer(path) is not None


def _find_tokenizer(path: str | Path) -> Path | None:
    """Return the folder of the tokenizer (or the .gguf file), or None."""
    path = model_path(path)
    model = locate_model(path)
    for candidate in (model, path / "tokenizer", path.parent / "tokenizer"):
        if candidate.is_file() or (candidate / "tokenizer.json").exists():
            return candidate
    return _find_tokenizer(find_base_model(model)) if is_adapter(model) else None
