"""Promotions and rollbacks in a running server: a new model is loaded beside the old one, new
requests go to it, and the old one is freed when its answers have ended.

One change at a time: a second one is refused while the first is being made.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastlm.errors import InputError
from fastlm.serve import loading
from fastlm.serve.api_error import ApiError
from fastlm.serve.metrics import labelled
from fastlm.serve.middleware import log
from fastlm.serve.models import Models, Served
from fastlm.serve.state import ModelRef, State, read_state

if TYPE_CHECKING:
    from fastlm.serve.loading import Loader
    from fastlm.serve.responses import Feedback


class Allowed:
    """Which models may be promoted: those named at the start, and what is below ``folder``."""

    def __init__(self, named: Sequence[str], folder: Path | None):
        self.named = {model_key(path) for path in named}
        self.folder = None if folder is None else folder.resolve()

    def find(self, given: str) -> str:
        """The path that is meant; a relative one is below the folder. InputError: not allowed,
        whether or not anything is there."""
        if given and "\0" not in given:
            if model_key(given) in self.named:
                return given
            if self.folder is not None and not given.startswith("model:"):
                path = (self.folder / given).resolve()  # an absolute one replaces the folder
                if path != self.folder and path.is_relative_to(self.folder):
                    return str(path)
        below = "" if self.folder is None else ", or one below --models-dir"
        raise InputError(f"model: expected one that was named at start{below}, got {given!r:.200}")


def model_key(path: str) -> str:
    """Return the name of a package's model as it is, else an absolute path."""
    return path if path.startswith("model:") else str(Path(path).resolve())


class ModelManager:
    """Loads models as the last decision left them, and changes them as it is asked to. ``base``:
    the model of the command line. ``path``: of the state file."""

    def __init__(self, loader: "Loader", base: str, path: Path, allowed: Allowed):
        self.loader, self.path, self.allowed = loader, path, allowed
        self.models, self.state = restore_models(loader, base, path)
        self.decisions: Counter[str] = Counter()  # of this process
        self._busy = False

    def begin(self) -> None:
        """Write the state of the start, before requests come."""
        self.state = replace(self.state, canary=None)
        self.state.save(self.path)

    @contextmanager
    def _change(self) -> Iterator[None]:
        if self._busy:
            raise ApiError(
                "model: another promotion or rollback is being made", status=409, code="busy",
                headers={"retry-after": "5"},
            )  # fmt: skip
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def promote(self, given: str | None, *, allow_other_tokenizer: bool = False) -> None:
        """Let the model at a path answer, or the canary (None, or its path).

        ``allow_other_tokenizer``: accept a model whose token ids mean something else. InputError,
        ApiError: the model is refused; the old one answers as before.
        """
        with self._change():
            if await self._end_experiment("promote", given):
                return
            if given is None:
                raise InputError("model: expected a path, got none, and no canary runs")
            await self._load(
                self.allowed.find(given), "promote", allow_other_tokenizer=allow_other_tokenizer
            )

    async def rollback(self) -> None:
        """End the canary, or go back to the model before the last promotion, once. As `promote`."""
        with self._change():
            if await self._end_experiment("roll back", None):
                return
            if (previous := self.state.previous) is None:
                raise InputError("expected a promotion to undo, got none (or one undone already)")
            await self._load(
                previous.path, "roll back", previous.digest, allow_other_tokenizer=True
            )

    async def _end_experiment(self, action: Any, given: str | None) -> bool:
        """End the experiment that runs, as somebody asked for. False: none runs."""
        return False

    async def _load(
        self, path: str, action: str, digest: str | None = None, *, allow_other_tokenizer: bool
    ) -> None:
        """``digest``: the files must be those that they were."""
        old = self.models.current

        def load() -> Served:
            if digest is not None and loading.model_digest(Path(path)) != digest:
                raise InputError(f"{path}: expected what was served before, its files have changed")
            new = self.loader.beside(Path(path), old)
            try:
                if not allow_other_tokenizer and not loading.same_tokens(
                    new.tokenizer, old.tokenizer
                ):
                    raise InputError(
                        "model: expected the current model's tokenizer, whose token ids clients may"
                        " send, got another (--allow-other-tokenizer accepts it)"
                    )
            except BaseException:
                new.engine.close()
                raise
            return new

        new = await asyncio.to_thread(load)
        known = ModelRef(new.path, new.digest)
        # what was rolled back is not gone back to: the command may be given twice
        previous = self.state.current if action == "promote" else None
        state = replace(self.state, current=known, previous=previous)
        try:
            await self._save(state.with_decision(action, model=new.name, path=path, reason="asked"))
        except BaseException:
            new.engine.close()
            raise
        self.models.replace(new)

    async def _save(self, state: State) -> None:
        await asyncio.to_thread(state.save, self.path)
        self.state = state
        told = state.decisions[-1]
        self.decisions[told["action"]] += 1
        log("decision", **{key: value for key, value in told.items() if key != "at"})

    def record_feedback(self, feedback: "Feedback") -> None:
        """Count what somebody says for the model that answered. For any thread but the event
        loop's. InputError: the database cannot be used."""

    def model_of(self, response_id: str) -> str | None:
        """Return the name of the model that gave an answer, where it is known."""
        return None

    async def status(self) -> dict[str, Any]:
        """Return what `GET /v1/canary` answers."""
        return {
            "object": "canary", "status": "none", "model": self.models.current.name,
            "path": self.state.current.path,
            "previous": self.state.previous and self.state.previous.path,
            "leaving": [served.name for served in self.models.leaving],
            "decisions": self.state.decisions,
        }  # fmt: skip

    def collect(self) -> Iterator[Metric]:
        """Return what Prometheus scrapes."""
        models = self.models
        roles = {(served.name, "leaving"): 1 for served in models.leaving}
        roles[models.current.name, "current"] = 1
        if models.experiment is not None:
            roles[models.experiment.served.name, "canary"] = 1
        yield labelled(GaugeMetricFamily, "model", "Models in memory", ["model", "role"], roles)
        yield labelled(
            CounterMetricFamily, "model_answers", "Answers of each model", ["model", "ended"],
            models.answers,
        )  # fmt: skip
        yield labelled(
            CounterMetricFamily, "model_decisions",
            "Promotions, rollbacks and trials without a decision", ["action"],
            {(action,): count for action, count in list(self.decisions.items())},
        )  # fmt: skip


def restore_models(loader: "Loader", base: str, path: Path) -> tuple[Models, State]:
    """Load what the last decision left at the state file ``path``: the model ``base``, or what was
    promoted in its place.

    InputError: a model that cannot be used, or is no longer what was decided on.
    """
    base = model_key(base)
    state = read_state(path)
    if state is not None and state.base == base:
        try:
            unchanged = model_ref(state.current.path).digest == state.current.digest
        except InputError as error:
            raise InputError(
                f"{path}: expected the model that was promoted last, {state.current.path}, got:"
                f" {error} (put it back, or delete the state file to begin with --model)"
            ) from None
        if not unchanged and (state.current.path != base or state.previous is not None):
            raise InputError(
                f"{path}: expected {state.current.path} as it was when it was promoted, its files"
                " have changed (delete the file to begin with --model)"
            )
        if not unchanged:  # trained again
            state = None
    if state is None or state.base != base:
        state = State(base, model_ref(base))
    current = loader.load(Path(state.current.path), state.current.digest)
    return Models(current, loader.name), state


def model_ref(path: str) -> ModelRef:
    """Return the model at a path as it is now. InputError: none is there."""
    path = model_key(path)
    return ModelRef(path, loading.model_digest(Path(path)))
