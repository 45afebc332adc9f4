"""Promote and roll back models in a running server: load the new model while the old one answers,
send new requests to the new one, and free the old one after its last answer.

Changes are made one at a time: a second one is refused while the first is in progress.
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
from fastlm.serve.metrics import metric_family
from fastlm.serve.middleware import log
from fastlm.serve.models import ServedModel, ServedModels
from fastlm.serve.state import ModelRef, ServerState, read_state

if TYPE_CHECKING:
    from fastlm.serve.feedback import Feedback
    from fastlm.serve.loading import ModelLoader


class AllowedModels:
    """The models that may be promoted: those of the command line, and all below ``folder``."""

    def __init__(self, paths: Sequence[str], folder: Path | None):
        self.paths = {model_key(path) for path in paths}
        self.folder = None if folder is None else folder.resolve()

    def resolve(self, path: str) -> str:
        """Return the full path of a model; a relative one is below the folder. InputError: the path
        is not allowed, whether or not a model is there."""
        if path and "\0" not in path:
            if model_key(path) in self.paths:
                return path
            if self.folder is not None and not path.startswith("model:"):
                full_path = (self.folder / path).resolve()  # an absolute path replaces the folder
                if full_path != self.folder and full_path.is_relative_to(self.folder):
                    return str(full_path)
        alternative = "" if self.folder is None else ", or one below --models-dir"
        raise InputError(f"model: expected one of the command line{alternative}, got {path!r:.200}")


def model_key(path: str) -> str:
    """Return the name of a packaged model unchanged, and any other path as an absolute one."""
    return path if path.startswith("model:") else str(Path(path).resolve())


class ModelManager:
    """Loads the model of the last decision, and promotes and rolls back models on request.

    ``base``: the model of the command line. ``path``: the state file.
    """

    def __init__(self, loader: "ModelLoader", base: str, path: Path, allowed: AllowedModels):
        self.loader, self.path, self.allowed = loader, path, allowed
        self.models, self.state = restore_models(loader, base, path)
        self.decisions: Counter[str] = Counter()  # by action, since this process started
        self._is_changing = False

    def start(self) -> None:
        """Write the first state, before requests come."""
        self.state = replace(self.state, canary=None)
        self.state.save(self.path)

    @contextmanager
    def _change(self) -> Iterator[None]:
        if self._is_changing:
            raise ApiError(
                "model: another promotion or rollback is in progress", status=409, code="busy",
                headers={"retry-after": "5"},
            )  # fmt: skip
        self._is_changing = True
        try:
            yield
        finally:
            self._is_changing = False

    async def promote(self, path: str | None, *, allow_other_tokenizer: bool = False) -> None:
        """Make the model at ``path`` the current one; None, or its path, means the canary.

        ``allow_other_tokenizer``: accept a model whose token ids mean something else. InputError,
        ApiError: the model is refused; the old one answers as before.
        """
        with self._change():
            if await self._end_experiment("promote", path):
                return
            if path is None:
                raise InputError("model: expected a path, got none, and no canary runs")
            await self._load(
                self.allowed.resolve(path), "promote", allow_other_tokenizer=allow_other_tokenizer
            )

    async def rollback(self) -> None:
        """End the canary, or undo the last promotion, once. Errors: as `promote`."""
        with self._change():
            if await self._end_experiment("roll back", None):
                return
            if (previous := self.state.previous) is None:
                raise InputError("expected a promotion to undo, got none (or one undone already)")
            await self._load(
                previous.path, "roll back", previous.digest, allow_other_tokenizer=True
            )

    async def _end_experiment(self, action: Any, path: str | None) -> bool:
        """End the running experiment with ``action``. Return False if none runs."""
        return False

    async def _load(
        self, path: str, action: str, digest: str | None = None, *, allow_other_tokenizer: bool
    ) -> None:
        """Load a model and make it the current one. ``digest``: the expected one of its files."""
        old = self.models.current

        def load() -> ServedModel:
            if digest is not None and loading.model_digest(Path(path)) != digest:
                raise InputError(f"{path}: expected the files served before, they have changed")
            new = self.loader.load_replacement(Path(path), old)
            try:
                if not allow_other_tokenizer and not loading.same_vocabulary(
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
        current = ModelRef(new.path, new.digest)
        # a second rollback must not return to the model that the first one removed
        previous = self.state.current if action == "promote" else None
        state = replace(self.state, current=current, previous=previous)
        try:
            await self._save(
                state.with_decision(action, model=new.name, path=path, reason="requested")
            )
        except BaseException:
            new.engine.close()
            raise
        self.models.replace(new)

    async def _save(self, state: ServerState) -> None:
        await asyncio.to_thread(state.save, self.path)
        self.state = state
        decision = state.decisions[-1]
        self.decisions[decision["action"]] += 1
        log("decision", **{key: value for key, value in decision.items() if key != "at"})

    def record_feedback(self, feedback: "Feedback") -> None:
        """Count feedback for the model that answered. Any thread but the event loop's may call it.
        InputError: the database cannot be used."""

    def model_name(self, response_id: str) -> str | None:
        """Return the name of the model that gave a response; None: unknown."""
        return None

    async def status(self) -> dict[str, Any]:
        """Return the response of `GET /v1/canary`."""
        return {
            "object": "canary", "status": "none", "model": self.models.current.name,
            "path": self.state.current.path,
            "previous": self.state.previous and self.state.previous.path,
            "draining": [served_model.name for served_model in self.models.draining],
            "decisions": self.state.decisions,
        }  # fmt: skip

    def collect(self) -> Iterator[Metric]:
        """Yield metrics for Prometheus."""
        models = self.models
        roles = {(served_model.name, "draining"): 1 for served_model in models.draining}
        roles[models.current.name, "current"] = 1
        if models.experiment is not None:
            roles[models.experiment.served_model.name, "canary"] = 1
        yield metric_family(
            GaugeMetricFamily, "model", "Models in memory", ["model", "role"], roles
        )
        yield metric_family(
            CounterMetricFamily, "model_answers", "Answers by model and outcome",
            ["model", "outcome"], models.answers,
        )  # fmt: skip
        yield metric_family(
            CounterMetricFamily, "model_decisions",
            "Promotions, rollbacks and canary trials without a decision", ["action"],
            {(action,): count for action, count in list(self.decisions.items())},
        )  # fmt: skip


def restore_models(
    loader: "ModelLoader", base: str, path: Path
) -> tuple[ServedModels, ServerState]:
    """Load the current model of the state file ``path``: ``base``, or the model that was promoted
    in its place.

    InputError: the model cannot be used, or its files have changed since the decision.
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
        if not unchanged:  # the base model was trained again
            state = None
    if state is None or state.base != base:
        state = ServerState(base, model_ref(base))
    current = loader.load(Path(state.current.path), state.current.digest)
    return ServedModels(current, loader.name), state


def model_ref(path: str) -> ModelRef:
    """Return the path and present digest of a model. InputError: there is no model."""
    path = model_key(path)
    return ModelRef(path, loading.model_digest(Path(path)))
