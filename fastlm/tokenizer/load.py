"""Find the tokenizer that is stored with a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.checkpoint.architectures import config_of
from fastlm.checkpoint.folder import base_of
from fastlm.errors import InputError
from fastlm.pipeline.run_folder import is_adapter, locate_model
from fastlm.sources.packages import model_path
from fastlm.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: str | Path, config: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer stored with a model (or in its run folder). It is refused when it has ids
    that the model's embedding lacks."""
    path = model_path(path)
    model = locate_model(path)
    found = _tokenizer_of(path, model)
    if found is None and is_adapter(model):
        return load_tokenizer(base_of(model), config)
    found = found or model
    tokenizer = Tokenizer.load(found)
    vocab = config_of(config, model).vocab_size
    if tokenizer.vocab_size > vocab:
        raise InputError(
            f"{found}: wanted a tokenizer of at most {vocab} ids (the model's embedding), "
            f"got {tokenizer.vocab_size}"
        )
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    """Whether `load_tokenizer` finds one."""
    path = model_path(path)
    model = locate_model(path)
    if _tokenizer_of(path, model) is not None:
        return True
    return is_adapter(model) and has_tokenizer(base_of(model))


def _tokenizer_of(path: Path, model: Path) -> Path | None:
    """The folder of the tokenizer (or the .gguf file), None where there is none."""
    places = (model, path / "tokenizer", path.parent / "tokenizer")
    return next((p for p in places if p.is_file() or (p / "tokenizer.json").exists()), None)
