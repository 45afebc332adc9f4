"""Models loaded for a server: at its start, and beside the one that answers."""

import contextlib
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
from fastlm.model.causal_lm import CausalLM
from fastlm.model.load import load_model
from fastlm.pipeline.run_folder import is_adapter, locate_model
from fastlm.serve.models import Served, release_memory
from fastlm.tokenizer.tokenizer import Tokenizer

NAMED = 8  # digits of a digest in a name
SPARE = 1.25  # of the size of a model's files: what loading it takes


@dataclass(frozen=True)
class Loader:
    """Loads models with the options of `fastlm.inference.engine.Engine`. ``name``: the public one;
    with ``versions`` a model's own name is that and the beginning of its digest. ``template``: a
    chat template in place of the model's. ``share``: so many models share the memory of a cache.
    """

    name: str
    act_bits: int | None
    options: dict[str, Any]
    draft_model: Path | None = None
    turns: AbstractContextManager[Any] | None = None
    versions: bool = False
    template: str | None = None
    share: int = 1

    def load(self, path: Path, digest: str) -> Served:
        """Load a model whose `model_digest` is known.

        InputError: a model or draft model that cannot be used, more pages than fit the memory.
        """
        model, tokenizer = load_model(path, self.act_bits)
        if self.template is not None:
            tokenizer.chat_template = self.template
            tokenizer.render_chat([{"role": "user", "content": "Hi"}])
        draft = None if self.draft_model is None else _load_draft(self.draft_model, tokenizer)
        try:
            engine = Engine(
                model, tokenizer, draft_model=draft, turns=self.turns, memory_share=self.share,
                **self.options,
            )  # fmt: skip
        except RuntimeError as error:  # torch's, which has no memory
            if (num_blocks := self.options.get("num_blocks")) is None:
                raise
            raise InputError(
                f"num_blocks: expected as many as fit the memory, got {num_blocks}: {reason(error)}"
            ) from None
        own = f"{self.name}@{digest[:NAMED]}" if self.versions else self.name
        return Served(engine, model, tokenizer, own, str(path), digest)

    def beside(self, path: Path, current: Served) -> Served:
        """Load a model while ``current`` answers, and try it: its engine runs when this returns.

        InputError: also that it is served already, that memory would not suffice, that the model
        cannot do what the current one does, or gives no answer.
        """
        try:
            if (digest := model_digest(path)) == current.digest:
                raise InputError(f"{path}, which is served already")
            _check_memory(int(size_of(path) * SPARE), "the model")
            served = self.load(path, digest)
            try:
                cache = served.engine.stats()
                if served.model.device.type == "cpu":  # a GPU's is taken at once
                    _check_memory(cache.pages * cache.page_bytes, "its cache (--num-blocks)")
                check_like(served, current)
                served.engine.start()
                check_answers(served)
            except BaseException:
                served.engine.close()
                raise
            return served
        except (InputError, OSError, RuntimeError) as error:
            text = reason(error)
        release_memory()  # not before the error has gone, whose frames hold the model
        raise InputError(f"model: expected one that can be served, got: {text}")


def check_like(new: Served, current: Served) -> None:
    """InputError: requests that ``current`` takes would be refused."""
    if new.context_limit < current.context_limit:
        raise InputError(
            f"expected a context of at least the current model's {current.context_limit} tokens, "
            "got"
            f" {new.context_limit}"
        )
    if current.tokenizer.chat_template is not None and new.tokenizer.chat_template is None:
        raise InputError("expected a model with a chat template, as the current one has")


def check_answers(served: Served) -> None:
    """InputError: the model does not give finite logits, or its engine fails."""
    token = served.tokenizer.bos_id or 0
    asked = Request([token], max_new_tokens=2, sampling=Sampling(temperature=0), ignore_eos=True)
    (result,) = served.engine.generate([asked])
    if result.finish_reason == "error":
        raise InputError(f"expected an answer of two tokens, got: {result.error}")


def name_of(path: Path) -> str:
    """What clients call the model at ``path`` by default: the name of its folder or file, of
    ``model:smollm2`` the part behind the colon."""
    given = str(path)
    return given.removeprefix("model:") if given.startswith("model:") else path.resolve().name


def files_of(path: Path) -> list[Path]:
    """The files that make a model, in one order. InputError: no model is there."""
    place = locate_model(path)
    if place.is_file():
        return [place]
    found = sorted(file for file in place.iterdir() if file.is_file() and file.name[0] != ".")
    if is_adapter(place):
        found += files_of(Path(find_base_model(place)))
    return found


def size_of(path: Path) -> int:
    """Bytes of a model's files."""
    return sum(file.stat().st_size for file in files_of(path))


def free_memory() -> int | None:
    """Bytes that this process may still take, of the machine or its container. None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = {line.split(":")[0]: line.split()[1] for line in lines}
        free = int(told["MemAvailable"]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, most - used + int(kept.get("inactive_file", 0)))
    return free


def _check_memory(wanted: int, what: str) -> None:
    free = free_memory()
    if free is not None and wanted > free:
        raise InputError(
            f"expected {wanted / 2**20:,.0f} MiB of free memory for {what}, got {free / 2**20:,.0f}"
        )


def _load_draft(path: Path, tokenizer: Tokenizer) -> CausalLM:
    """The model that guesses; InputError: its tokens are not those of the tokenizer."""
    draft, other = load_model(path)
    if other.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise InputError(f"draft_model: expected one with the model's tokenizer, got {path}")
    return draft


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether a token id means the same to both."""
    return a.backend.get_vocab() == b.backend.get_vocab()
