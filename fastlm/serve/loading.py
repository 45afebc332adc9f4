"""Load models for a server: at its start, and while another model answers."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.checkpoint.digest import model_digest
from fastlm.checkpoint.folder import find_base_model
from fastlm.errors import InputError
from fastlm.files import reason
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.machine import available_memory
from fastlm.model.causal_lm import CausalLM
from fastlm.model.load import load_for_inference
from fastlm.pipeline.run_folder import is_adapter, locate_model
from fastlm.serve.models import ServedModel, release_memory
from fastlm.tokenizer.tokenizer import Tokenizer

DIGEST_DIGITS = 8  # in the name of a model version
LOAD_MEMORY = 1.25  # memory that loading a model takes, in sizes of its files


@dataclass(frozen=True)
class ModelLoader:
    """Loads models with the ``options`` of `fastlm.inference.engine.Engine`.

    ``name``: the public name. ``versioned_names``: append the beginning of a model's digest to its
    name. ``lock``: engines that share the processors hold it during a step. ``template``: a chat
    template in place of the model's. ``num_engines``: the number of models that share the memory
    of one cache.
    """

    name: str
    act_bits: int | None
    options: dict[str, Any]
    draft_model: Path | None = None
    lock: AbstractContextManager[Any] | None = None
    versioned_names: bool = False
    template: str | None = None
    num_engines: int = 1

    def load(self, path: Path, digest: str) -> ServedModel:
        """Load a model; ``digest`` is its `model_digest`.

        InputError: the model or draft model cannot be used, or the cache exceeds the memory.
        """
        model, tokenizer = load_for_inference(path, self.act_bits)
        if self.template is not None:
            tokenizer.chat_template = self.template
            tokenizer.render_chat([{"role": "user", "content": "Hi"}])
        draft = None if self.draft_model is None else _load_draft(self.draft_model, tokenizer)
        try:
            engine = Engine(
                model, tokenizer, draft_model=draft, step_lock=self.lock,
                num_engines=self.num_engines, **self.options,
            )  # fmt: skip
        except RuntimeError as error:  # torch has no memory left
            if (num_blocks := self.options.get("num_blocks")) is None:
                raise
            raise InputError(
                f"num_blocks: expected as many as fit the memory, got {num_blocks}: {reason(error)}"
            ) from None
        name = f"{self.name}@{digest[:DIGEST_DIGITS]}" if self.versioned_names else self.name
        return ServedModel(engine, model, tokenizer, name, str(path), digest)

    def load_replacement(self, path: Path, current: ServedModel) -> ServedModel:
        """Load a model while ``current`` answers, start its engine and test it.

        InputError: as `load`, or the model is served already, does not fit the free memory, cannot
        do what the current one does, or gives no answer.
        """
        try:
            if (digest := model_digest(path)) == current.digest:
                raise InputError(f"{path}, which is served already")
            _check_memory(int(model_size(path) * LOAD_MEMORY), "the model")
            served_model = self.load(path, digest)
            try:
                cache = served_model.engine.stats()
                if served_model.model.device.type == "cpu":  # on a GPU the engine has allocated it
                    _check_memory(cache.num_blocks * cache.block_bytes, "its cache (--num-blocks)")
                check_compatible(served_model, current)
                served_model.engine.start()
                check_generation(served_model)
            except BaseException:
                served_model.engine.close()
                raise
            return served_model
        except (InputError, OSError, RuntimeError) as error:
            text = reason(error)
        release_memory()  # here, since the frames of the error refer to the model
        raise InputError(f"model: expected one that can be served, got: {text}")


def check_compatible(new: ServedModel, current: ServedModel) -> None:
    """Raise InputError if ``new`` would refuse requests that ``current`` accepts."""
    if new.context_limit < current.context_limit:
        raise InputError(
            f"expected a context of at least the current model's {current.context_limit} tokens,"
            f" got {new.context_limit}"
        )
    if current.tokenizer.chat_template is not None and new.tokenizer.chat_template is None:
        raise InputError("expected a model with a chat template, as the current one has")


def check_generation(served_model: ServedModel) -> None:
    """Raise InputError if the model's logits are not finite or its engine fails."""
    token = served_model.tokenizer.bos_id or 0
    request = Request([token], max_new_tokens=2, sampling=Sampling(temperature=0), ignore_eos=True)
    (result,) = served_model.engine.generate([request])
    if result.finish_reason == "error":
        raise InputError(f"expected an answer of two tokens, got: {result.error}")


def default_model_name(path: Path) -> str:
    """Return the name of the model's folder or file; of ``model:smollm2``, the part after the
    colon."""
    text = str(path)
    return text.removeprefix("model:") if text.startswith("model:") else path.resolve().name


def model_files(path: Path) -> list[Path]:
    """Return the files of a model in a fixed order. InputError: there is no model."""
    location = locate_model(path)
    if location.is_file():
        return [location]
    files = sorted(file for file in location.iterdir() if file.is_file() and file.name[0] != ".")
    if is_adapter(location):
        files += model_files(Path(find_base_model(location)))
    return files


def model_size(path: Path) -> int:
    """Return the number of bytes of a model's files."""
    return sum(file.stat().st_size for file in model_files(path))


def _check_memory(size: int, purpose: str) -> None:
    free = available_memory()
    if free is not None and size > free:
        raise InputError(
            f"expected {size / 2**20:,.0f} MiB of free memory for {purpose}, got"
            f" {free / 2**20:,.0f}"
        )


def _load_draft(path: Path, tokenizer: Tokenizer) -> CausalLM:
    """Load the draft model. InputError: its vocabulary is not that of ``tokenizer``."""
    draft, draft_tokenizer = load_for_inference(path)
    if not same_vocabulary(draft_tokenizer, tokenizer):
        raise InputError(f"draft_model: expected one with the model's tokenizer, got {path}")
    return draft


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether each token id means the same to both tokenizers."""
    return a.backend.get_vocab() == b.backend.get_vocab()
