"""The models of a server: the one that answers, perhaps one of an experiment beside it, and those
that were replaced and whose last answers still run.

A request holds its model until its response has ended (`ModelLease`), so a model is freed only when
nobody needs it any more. All of this belongs to the event loop, except where a method says
otherwise.
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
from fastlm.inference.structured_output import Grammars
from fastlm.serve.api_error import ApiError
from fastlm.serve.prompts import Prompts
from fastlm.serve.protocol.completion import GenerationRequest
from fastlm.serve.protocol.embedding import EmbeddingRequest

if TYPE_CHECKING:
    from fastlm.inference.engine import Engine
    from fastlm.model.causal_lm import CausalLM
    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.hooks import ModelExperiment
    from fastlm.tokenizer.tokenizer import Tokenizer

NOW = ("running", "waiting", "pages", "page_bytes", "pages_used", "pages_cached")  # no counters


@dataclass(eq=False)
class Served:
    """A model behind its engine. ``name``: what its responses call it. ``path``: as it was given;
    ``digest``: of its files, see `fastlm.serve.loading`; both empty for a model of this process.
    """

    engine: "Engine"
    model: "CausalLM"
    tokenizer: "Tokenizer"
    name: str
    path: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        # a cache smaller than the context bounds a request, too
        self.context_limit = min(self.engine.context_limit, self.engine.stats().pages * BLOCK_SIZE)
        self.prompts = Prompts(self.tokenizer, self.context_limit)
        self.grammars = Grammars(self.tokenizer, self.model.config)
        self.created = int(time.time())
        self.users = 0
        self.unused = asyncio.Event()
        self.unused.set()

    @torch.inference_mode()
    def embedding(self, ids: Sequence[int], dimensions: int | None = None) -> np.ndarray:
        """The mean of the last layer's output over the tokens, its first ``dimensions``, of length
        1; float32. For the engine's thread. ApiError: it is not finite."""
        hidden = self.model.hidden(torch.tensor([ids], device=self.model.device))[0].float()
        vector = torch.nn.functional.normalize(hidden.mean(0)[:dimensions], dim=0)
        if not bool(vector.isfinite().all()):
            raise ApiError(
                "model: expected finite numbers as an embedding, got NaN or infinity",
                status=500, kind="server_error",
            )  # fmt: skip
        return vector.cpu().numpy().astype("<f4")

    def acquire(self) -> None:
        self.users += 1
        self.unused.clear()

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            self.unused.set()


class Models:
    """``current`` answers to ``name`` (by default its own), and so does the model of ``experiment``
    for some of the conversations. Each also answers to a name of its own.
    """

    def __init__(self, current: Served, name: str | None = None):
        self.current, self.name = current, name or current.name
        self.experiment: ModelExperiment | None = None
        self.beside: list[Served] = []  # by names of their own, as long as the server runs
        self.leaving: list[Served] = []
        self.answers: Counter[tuple[str, str]] = Counter()  # by model and how they ended
        self._past: EngineStats | None = None  # counters of models that were freed
        self._freeing: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    @property
    def live(self) -> list[Served]:
        """What new requests may go to, the current model first."""
        return [self.current, *([self.experiment.served] if self.experiment else []), *self.beside]

    def add(self, served: Served) -> None:
        """Let a model answer to its own name, beside the others."""
        self.beside.append(served)

    @property
    def names(self) -> list[str]:
        """What clients may call, the public name first."""
        return list(dict.fromkeys([self.name, *(served.name for served in self.live)]))

    def named(self, name: str) -> Served:
        """The model of this name, the current one for the public name. ApiError: none has it."""
        if name == self.name:
            return self.current
        for served in self.live:
            if name == served.name:
                return served
        wanted = " or ".join(map(repr, self.names))
        raise ApiError(
            f"model: expected {wanted}, got {name!r:.80}", status=404, param="model",
            code="model_not_found",
        )  # fmt: skip

    def lease(self, request: GenerationRequest | EmbeddingRequest, client: str) -> "ModelLease":
        """Choose the model for a request, and hold it. ApiError: none has the name that is asked.

        Embeddings of two models do not go together: such requests stay with the current model.
        """
        served, experiment = self.named(request.model), self.experiment
        if experiment is None or isinstance(request, EmbeddingRequest) or served in self.beside:
            return ModelLease(self, served)
        return experiment.lease(self, served, request, client)

    def start(self) -> None:
        """Begin to answer, and to watch the experiment."""
        for served in self.live:
            served.engine.start()
        if self.experiment is not None:
            self._watching = asyncio.get_running_loop().create_task(self.experiment.watch())

    def close(self) -> None:
        """End all engines, at once or one after the other. For any thread."""
        for served in [*self.live, *self.leaving]:
            served.engine.close()

    def replace(self, new: Served) -> None:
        """Let ``new`` answer from now on; it may be the experiment's. The old answers end."""
        old, self.current = self.current, new
        if self.experiment is not None and self.experiment.served is new:
            self.experiment = None
        self._leave(old)

    def end_experiment(self) -> None:
        """Let the current model answer alone. The other one's answers end."""
        if self.experiment is not None:
            served, self.experiment = self.experiment.served, None
            self._leave(served)

    def _leave(self, served: Served) -> None:
        self.leaving.append(served)
        task = asyncio.get_running_loop().create_task(self._free(served))
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def _free(self, served: Served) -> None:
        await served.unused.wait()
        await asyncio.to_thread(served.engine.close)
        self._past = summed([served.engine.stats()], self._past, now=False)
        self.leaving.remove(served)
        model = weakref.ref(served.model)
        del served
        for pause in (0.0, 0.1, 1.0, 10.0):  # what ends just now may hold the model a little longer
            await asyncio.sleep(pause)
            await asyncio.to_thread(release_memory)
            if model() is None:
                break

    def stats(self) -> EngineStats:
        """The sums over all engines; counters include those of models that are gone. For any
        thread."""
        every = [served.engine.stats() for served in [*self.live, *self.leaving]]
        return summed(every, self._past)


class ModelLease:
    """A request's use of a model, until `end`. Experiments have leases of their own."""

    def __init__(self, models: Models, served: Served):
        self.models, self.served = models, served
        served.acquire()

    def fall_back(self) -> bool:
        """Move to the current model from one that was chosen for the client and has refused the
        request. Returns whether it was."""
        return False

    async def refused(self, id: str) -> None:
        """Take that the answer comes after `fall_back`."""

    async def record(self, id: str, response: "ChatCompletionResponse | None") -> None:
        """Take how an answer ended; None: it failed."""

    async def answered(self, response: "ChatCompletionResponse") -> None:
        """Count a complete response, before the client has all of it."""
        self.models.answers[self.served.name, "whole"] += 1
        await self.record(response.id, response)

    async def failed(self, id: str, error: Exception) -> None:
        """Count an answer that failed through no fault of its client's."""
        if isinstance(error, ApiError) and (error.status < 500 or error.code == "stopping"):
            return
        self.models.answers[self.served.name, "error"] += 1
        await self.record(id, None)

    def end(self) -> None:
        self.served.release()


def summed(every: Sequence[EngineStats], past: EngineStats | None, now: bool = True) -> EngineStats:
    """The sum of statistics; ``now``: with what engines hold. ``past``: counters alone. The bytes
    of a page are those of the first."""
    given = [*every, *([past] if past is not None else [])]
    total: dict[str, Any] = {}
    for field in fields(EngineStats):
        values = [getattr(one, field.name) for one in given]
        if field.name == "finished":
            total[field.name] = dict(sum(map(Counter, values), Counter()))
        else:
            total[field.name] = sum(values)
    total["page_bytes"] = every[0].page_bytes if every else 0
    told = EngineStats(**total)
    return told if now else replace(told, **dict.fromkeys(NOW, 0))


def release_memory() -> None:
    """Return the memory of a model that nobody refers to. Its modules refer to each other, and
    glibc keeps freed pieces below 32 MiB."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
