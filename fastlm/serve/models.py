"""The models of a server: the current one, the adapters, perhaps the canary of an experiment, and
replaced models that still finish their answers.

A request holds its model until its response has ended (`ModelLease`), so a model is freed after its
last response. Only the event loop may use these classes, except where a method says otherwise.
"""

import asyncio
import ctypes
import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastlm.inference.block_manager import BLOCK_SIZE
from fastlm.inference.requests import EngineStats
from fastlm.inference.structured_output import GrammarCompiler
from fastlm.serve.api_error import ApiError
from fastlm.serve.prompt_encoder import PromptEncoder
from fastlm.serve.protocol.completion import GenerationRequest
from fastlm.serve.protocol.embedding import EmbeddingRequest

if TYPE_CHECKING:
    from fastlm.inference.engine import Engine
    from fastlm.model.causal_lm import CausalLM
    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.hooks import ModelExperiment
    from fastlm.tokenizer.tokenizer import Tokenizer

# the fields of `EngineStats` that are gauges; the others are counters
GAUGES = (
    "running",
    "waiting",
    "num_blocks",
    "block_bytes",
    "used_blocks",
    "cached_blocks",
)


@dataclass(eq=False)
class ServedModel:
    """A model with its engine, tokenizer and prompt encoder.

    ``name``: its name in responses. ``path``: from the command line or a promotion. ``digest``:
    hash of its files (`fastlm.serve.loading`). Both are empty for a model made in this process.
    """

    engine: "Engine"
    model: "CausalLM"
    tokenizer: "Tokenizer"
    name: str
    path: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        # a cache that is smaller than the context limits a request, too
        self.context_limit = min(
            self.engine.context_limit, self.engine.stats().num_blocks * BLOCK_SIZE
        )
        self.prompt_encoder = PromptEncoder(self.tokenizer, self.context_limit)
        self.grammar_compiler = GrammarCompiler(self.tokenizer, self.model.config)
        self.created = int(time.time())
        self.leases = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @torch.inference_mode()
    def embedding(self, ids: Sequence[int], dimensions: int | None = None) -> np.ndarray:
        """Return the mean of the last layer's output over the tokens: its first ``dimensions``,
        scaled to length 1, in float32. Only the engine's thread may call it. ApiError: the result
        is not finite."""
        hidden = self.model.hidden(torch.tensor([ids], device=self.model.device))[0].float()
        vector = torch.nn.functional.normalize(hidden.mean(0)[:dimensions], dim=0)
        if not bool(vector.isfinite().all()):
            raise ApiError(
                "model: expected finite numbers as an embedding, got NaN or infinity",
                status=500, kind="server_error",
            )  # fmt: skip
        return vector.cpu().numpy().astype("<f4")

    def acquire(self) -> None:
        self.leases += 1
        self.idle.clear()

    def release(self) -> None:
        self.leases -= 1
        if not self.leases:
            self.idle.set()


class ServedModels:
    """The models that a server can answer with.

    ``current`` answers requests to the public ``name`` (by default its own name). The model of
    ``experiment`` answers some of their conversations. Each model also answers to its own name.
    """

    def __init__(self, current: ServedModel, name: str | None = None):
        self.current, self.name = current, name or current.name
        self.experiment: ModelExperiment | None = None
        self.adapters: list[ServedModel] = []  # served by their own names until the server stops
        self.draining: list[ServedModel] = []  # replaced models that still have leases
        self.answers: Counter[tuple[str, str]] = Counter()  # by model name and outcome
        self._freed_stats: EngineStats | None = None  # counters of models that were freed
        self._freeing: set[asyncio.Task[None]] = set()
        self._watch_task: asyncio.Task[None] | None = None

    @property
    def live(self) -> list[ServedModel]:
        """The models that take new requests, the current one first."""
        return [
            self.current,
            *([self.experiment.served_model] if self.experiment else []),
            *self.adapters,
        ]

    def add_adapter(self, served_model: ServedModel) -> None:
        """Serve another model under its own name."""
        self.adapters.append(served_model)

    @property
    def names(self) -> list[str]:
        """The names that clients may use, the public name first."""
        return list(dict.fromkeys([self.name, *(served_model.name for served_model in self.live)]))

    def find(self, name: str) -> ServedModel:
        """Return the model of this name; for the public name, the current one. ApiError: no model
        has it."""
        if name == self.name:
            return self.current
        for served_model in self.live:
            if name == served_model.name:
                return served_model
        names = " or ".join(map(repr, self.names))
        raise ApiError(
            f"model: expected {names}, got {name!r:.80}", status=404, param="model",
            code="model_not_found",
        )  # fmt: skip

    def lease(self, request: GenerationRequest | EmbeddingRequest, client: str) -> "ModelLease":
        """Choose the model for a request and hold it. ApiError: no model has the request's name.

        Embeddings of two models cannot be compared, so the current model computes all of them.
        """
        served_model, experiment = self.find(request.model), self.experiment
        is_embedding = isinstance(request, EmbeddingRequest)
        if experiment is None or is_embedding or served_model in self.adapters:
            return ModelLease(self, served_model)
        return experiment.lease(self, served_model, request, client)

    def start(self) -> None:
        """Start the engines, and watch the experiment."""
        for served_model in self.live:
            served_model.engine.start()
        if self.experiment is not None:
            self._watch_task = asyncio.get_running_loop().create_task(self.experiment.watch())

    def close(self) -> None:
        """Close all engines. Any thread may call it."""
        for served_model in [*self.live, *self.draining]:
            served_model.engine.close()

    def replace(self, new: ServedModel) -> None:
        """Send new requests to ``new``, which may be the experiment's model. The old model finishes
        its answers."""
        old, self.current = self.current, new
        if self.experiment is not None and self.experiment.served_model is new:
            self.experiment = None
        self._drain(old)

    def end_experiment(self) -> None:
        """Send all new requests to the current model. The experiment's model finishes its
        answers."""
        if self.experiment is not None:
            served_model, self.experiment = self.experiment.served_model, None
            self._drain(served_model)

    def _drain(self, served_model: ServedModel) -> None:
        self.draining.append(served_model)
        task = asyncio.get_running_loop().create_task(self._free(served_model))
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def _free(self, served_model: ServedModel) -> None:
        await served_model.idle.wait()
        await asyncio.to_thread(served_model.engine.close)
        self._freed_stats = sum_stats(
            [served_model.engine.stats()], self._freed_stats, with_gauges=False
        )
        self.draining.remove(served_model)
        model = weakref.ref(served_model.model)
        del served_model
        for pause in (0.0, 0.1, 1.0, 10.0):  # a request that is ending may still refer to the model
            await asyncio.sleep(pause)
            await asyncio.to_thread(release_memory)
            if model() is None:
                break

    def stats(self) -> EngineStats:
        """Sum the statistics of all engines; the counters include models that were freed. Any
        thread may call it."""
        models = [*self.live, *self.draining]
        return sum_stats([model.engine.stats() for model in models], self._freed_stats)


class ModelLease:
    """Holds a model for one request until `end`. Experiments subclass it."""

    def __init__(self, models: ServedModels, served_model: ServedModel):
        self.models, self.served_model = models, served_model
        served_model.acquire()

    def fall_back(self) -> bool:
        """Switch to the current model if the experiment chose another one, which has refused the
        request. Return True if it did."""
        return False

    async def record_refusal(self, id: str) -> None:
        """Record that the response ``id`` comes after `fall_back`."""

    async def record_outcome(self, id: str, response: "ChatCompletionResponse | None") -> None:
        """Record the outcome of a response; None: it failed."""

    async def record_response(self, response: "ChatCompletionResponse") -> None:
        """Count a complete response, before the client has all of it."""
        self.models.answers[self.served_model.name, "complete"] += 1
        await self.record_outcome(response.id, response)

    async def record_failure(self, id: str, error: Exception) -> None:
        """Count a response that failed, unless the client or a stopping server is the cause."""
        if isinstance(error, ApiError) and (error.status < 500 or error.code == "stopping"):
            return
        self.models.answers[self.served_model.name, "error"] += 1
        await self.record_outcome(id, None)

    def end(self) -> None:
        self.served_model.release()


def sum_stats(
    stats: Sequence[EngineStats], freed: EngineStats | None, *, with_gauges: bool = True
) -> EngineStats:
    """Sum the statistics of engines. The bytes of a block are those of the first engine.

    ``freed``: counters of models that were freed. ``with_gauges``: False sets the gauges to 0.
    """
    summands = [*stats, *([freed] if freed is not None else [])]
    total: dict[str, Any] = {}
    for field in fields(EngineStats):
        values = [getattr(summand, field.name) for summand in summands]
        if field.name == "finished":
            total[field.name] = dict(sum(map(Counter, values), Counter()))
        else:
            total[field.name] = sum(values)
    total["block_bytes"] = stats[0].block_bytes if stats else 0
    result = EngineStats(**total)
    return result if with_gauges else replace(result, **dict.fromkeys(GAUGES, 0))


def release_memory() -> None:
    """Return the memory of unreferenced models to the system. A model's modules refer to each
    other, so they need a garbage collection, and glibc keeps freed blocks below 32 MiB."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
