"""The models of a server: the one that answers, perhaps a canary beside it, and those that were
replaced and whose last answers still run.

A request holds its model until its response has ended (`Turn`), so a model is freed only when
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

from fastlm.inference.block_manager import PAGE
from fastlm.inference.requests import EngineStats
from fastlm.inference.structured_output import Grammars
from fastlm.serve.api_error import ApiError
from fastlm.serve.prompts import Prompts
from fastlm.serve.protocol.completion import GenerationRequest
from fastlm.serve.protocol.embedding import EmbeddingRequest
from fastlm.serve.trial import Trial, unit_of, uses_ids

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.serve.answers import Answer
    from fastlm.serve.running import Engine
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
        self.context_limit = min(self.engine.context_limit, self.engine.stats().pages * PAGE)
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

    def take(self) -> None:
        self.users += 1
        self.unused.clear()

    def give(self) -> None:
        self.users -= 1
        if not self.users:
            self.unused.set()


class Models:
    """``current`` answers to ``name`` (by default its own), and so does the canary of ``trial`` for
    its share of the conversations. Each also answers to a name of its own.
    """

    def __init__(self, current: Served, name: str | None = None, trial: Trial | None = None):
        self.current, self.name, self.trial = current, name or current.name, trial
        self.beside: list[Served] = []  # by names of their own, as long as the server runs
        self.leaving: list[Served] = []
        self.answers: Counter[tuple[str, str]] = Counter()  # by model and how they ended
        self._past: EngineStats | None = None  # counters of models that were freed
        self._freeing: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    @property
    def live(self) -> list[Served]:
        """What new requests may go to, the current model first."""
        return [self.current, *([self.trial.served] if self.trial else []), *self.beside]

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
            f"model: wanted {wanted}, got {name!r:.80}", status=404, param="model",
            code="model_not_found",
        )  # fmt: skip

    def turn(self, request: GenerationRequest | EmbeddingRequest, client: str) -> "Turn":
        """Choose the model for a request, and hold it. ApiError: none has the name that is asked.

        Embeddings of two models do not go together, and neither do their token ids: such requests
        stay with the current model.
        """
        served, trial = self.named(request.model), self.trial
        if trial is None or isinstance(request, EmbeddingRequest) or served in self.beside:
            return Turn(self, served)
        unit = unit_of(request, client)
        assigned = request.model == self.name and (trial.same_tokens or not uses_ids(request))
        if assigned and trial.takes(unit):
            served = trial.served
        return Turn(self, served, trial, unit, assigned)

    def start(self) -> None:
        """Begin to answer, and to watch the trial."""
        for served in self.live:
            served.engine.start()
        if self.trial is not None:
            self._watching = asyncio.get_running_loop().create_task(self.trial.watch())

    def close(self) -> None:
        """End all engines, at once or one after the other. For any thread."""
        for served in [*self.live, *self.leaving]:
            served.engine.close()

    def replace(self, new: Served) -> None:
        """Let ``new`` answer from now on; it may be the canary. The old model's answers end."""
        old, self.current = self.current, new
        if self.trial is not None and self.trial.served is new:
            self.trial = None
        self._leave(old)

    def begin(self, trial: Trial) -> None:
        """Let a canary answer its share."""
        self.trial = trial

    def end_trial(self) -> None:
        """Let the current model answer alone. The canary's answers end."""
        if self.trial is not None:
            canary, self.trial = self.trial.served, None
            self._leave(canary)

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
            await asyncio.to_thread(give_memory_back)
            if model() is None:
                break

    async def freed(self) -> None:
        """Wait until no replaced model is left."""
        while self._freeing:
            await asyncio.wait(self._freeing)

    def stats(self) -> EngineStats:
        """The sums over all engines; counters include those of models that are gone. For any
        thread."""
        every = [served.engine.stats() for served in [*self.live, *self.leaving]]
        return summed(every, self._past)


class Turn:
    """A request's use of a model, until `end`."""

    def __init__(
        self,
        models: Models,
        served: Served,
        trial: Trial | None = None,
        unit: str = "",
        assigned: bool = False,
    ):
        self.models, self.served, self.trial = models, served, trial
        self.unit, self.assigned = unit, assigned
        self.arm = "new" if trial is not None and served is trial.canary else "old"
        self.began = time.perf_counter()
        served.take()

    def fall_back(self) -> bool:
        """Move from a canary, which was chosen for the client and has refused the request, to the
        current model. Whether that was so."""
        if self.arm != "new" or not self.assigned:
            return False
        self.served.give()
        self.served, self.arm = self.models.current, "old"
        self.served.take()
        return True

    async def refused(self, id: str) -> None:
        """Count what `fall_back` came from: the current model takes what its canary refuses."""
        trial, self.trial = self.trial, None  # a broken choice: what follows belongs to no arm
        if trial is not None:
            await trial.answered(  # the id itself is that of the current model's answer
                f"refused-{id}", self.unit, None, "new", trial.name, assigned=True, error=True
            )

    async def answered(self, answer: "Answer") -> None:
        """Count a whole answer. Its id is known to the trial before the client has all of it."""
        self.models.answers[self.served.name, "whole"] += 1
        if self.trial is None:
            return
        tokens = sum(choice.tokens for choice in answer.choices)
        ended = [choice.finish_reason for choice in answer.choices]
        seconds = time.perf_counter() - self.began
        conversation = getattr(answer.request, "conversation_id", None)
        await self.trial.answered(
            answer.id, self.unit, conversation, self.arm, self.served.name, assigned=self.assigned,
            seconds=seconds / max(1, tokens), stopped="length" not in ended,
        )  # fmt: skip

    async def failed(self, id: str, error: Exception) -> None:
        """Count an answer that failed through no fault of its client's."""
        if isinstance(error, ApiError) and (error.status < 500 or error.code == "stopping"):
            return
        self.models.answers[self.served.name, "error"] += 1
        if self.trial is not None:
            await self.trial.answered(
                id, self.unit, None, self.arm, self.served.name, assigned=self.assigned, error=True
            )

    def end(self) -> None:
        self.served.give()


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


def give_memory_back() -> None:
    """Return the memory of a model that nobody refers to. Its modules refer to each other, and
    glibc keeps freed pieces below 32 MiB."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
