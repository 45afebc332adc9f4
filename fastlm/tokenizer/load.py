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
    """Load the tokenizer stored with a model (or in its run folder, or with an adapter's base). It
    is refused when it has ids that the model's embedding lacks."""
    model = locate_model(model_path(path))
    found = _tokenizer_of(path) or model
    tokenizer = Tokenizer.load(found)
    vocab = parse_config(config, model).vocab_size
    if tokenizer.vocab_size > vocab:
        raise InputError(
            f"{found}: expected a tokenizer of at most {vocab} ids (the model's embedding), "
            f"got {tokenizer.vocab_size}"
        )
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    """Whether `load_tokenizer` finds one."""
    return _tokenizer_of(path) is not None


def _tokenizer_of(path: str | Path) -> Path | None:
    """The folder of the tokenizer (or the .gguf file), None where there is none."""
    path = model_path(path)
    model = locate_model(path)
    for place in (model, path / "tokenizer", path.parent / "tokenizer"):
        if place.is_file() or (place / "tokenizer.json").exists():
            return place
    return _tokenizer_of(find_base_model(model)) if is_adapter(model) else None
