"""A canary beside the model that is served: which conversations it gets, and what became of them.

A conversation stays with its model: a hash of its id, or of its client and its first messages,
says which one answers. It counts once, however often its answers are judged, since its answers
depend on each other. `fastlm.serve.canary.decision` says whether it takes over.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from fastlm.errors import InputError
from fastlm.serve.canary.decision import CanaryConfig, CanaryVerdict, Variant, comparisons, judge
from fastlm.serve.middleware import log
from fastlm.serve.models import ModelLease, Models, Served
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.stats.latency import PacePairs
from fastlm.stats.sequential import SequentialResult

if TYPE_CHECKING:
    from fastlm.serve.canary.canary_store import CanaryStore
    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.responses import Feedback

LOOK_SECONDS = 1.0  # between two looks: a test takes 20 ms of the interpreter
WRITE_SECONDS = 5.0  # that the end of an answer waits for the database at most
MOST_WRITING = 1024  # answers that wait for the database; more are not counted


def unit_of(request: GenerationRequest, client: str) -> str:
    """What stays with one model, as a hash: a conversation by its id, else by its client and its
    messages up to the first of a user; a text by its client and its beginning."""
    if isinstance(request, ChatCompletionRequest):
        if request.conversation_id is not None:
            return _hash("id", request.conversation_id)
        count = next((i for i, m in enumerate(request.messages, 1) if m["role"] == "user"), None)
        return _hash("chat", client, json.dumps(request.messages[:count], sort_keys=True))
    assert isinstance(request, CompletionRequest)
    return _hash("text", client, json.dumps(request.prompts[0]))


def uses_ids(request: GenerationRequest) -> bool:
    """Whether a request has token ids in it."""
    listed = isinstance(request, CompletionRequest) and any(
        isinstance(prompt, list) for prompt in request.prompts
    )
    return listed or bool(request.stop_token_ids or request.logit_bias)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


@dataclass(eq=False)
class CanaryExperiment:
    """An experiment with a canary. ``decide`` is called in the event loop with a verdict, until
    `end` is.

    ``canary``: its model, None once it has ended, whose counts outlive the model.
    ``id``: its name in the database, new for each, and the salt of its hashes.
    ``tests``: `comparisons` as of the last look. ``paces``: of its conversations' first answers.
    ``same_tokens``: a token id means the same to both models. ``secret``: with which units are
    hashed for the database, so that nobody who has it can try what a prompt said.
    """

    canary: Served | None
    config: CanaryConfig
    store: "CanaryStore"
    id: str
    same_tokens: bool = True
    secret: str = ""
    decide: Callable[["CanaryExperiment", CanaryVerdict], Awaitable[Any]] | None = None
    verdict: CanaryVerdict | None = None
    tests: dict[str, SequentialResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.served.name
        self.arms: dict[str, Variant] = self.store.counts(self.id)
        self.paces = PacePairs()
        for arm, pace in self.store.first_paces(self.id):
            self.paces.add(arm, pace)
        self._changed = asyncio.Event()
        self._changed.set()  # what an earlier process counted may decide at once
        self._failed = asyncio.Event()  # the canary has: the next look does not wait
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing: set[asyncio.Task[None]] = set()
        self._one = CapacityLimiter(1)

    @property
    def served(self) -> Served:
        """The canary's model, while the experiment runs."""
        assert self.canary is not None
        return self.canary

    def lease(
        self, models: Models, served: Served, request: GenerationRequest, client: str
    ) -> "CanaryLease":
        """Choose the model of a request. Ids of tokens that mean something else to the canary stay
        with the current model."""
        unit = unit_of(request, client)
        assigned = request.model == models.name and (self.same_tokens or not uses_ids(request))
        if assigned and self.takes(unit):
            served = self.served
        return CanaryLease(models, served, self, unit, assigned)

    def takes(self, unit: str) -> bool:
        """Return whether the canary gets this conversation."""
        return int(_hash(self.id, unit)[:13], 16) < self.config.share * 16**13

    async def answered(
        self, id: str, unit: str, conversation: str | None, arm: str, model: str, *,
        assigned: bool, seconds: float | None = None, error: bool = False, stopped: bool = False,
    ) -> None:  # fmt: skip
        """Store and count an answer. ``seconds``: per token. A database that fails costs the
        experiment an answer, and one that hangs the client `WRITE_SECONDS`; the answer is counted
        later."""
        unit = _hash(self.secret, unit)
        is_outcome = self.config.metric == "stop" and assigned and not error

        def write() -> tuple[bool, bool]:
            timed = self.store.answer(
                response_id=id, experiment=self.id, unit=unit, conversation_id=conversation,
                arm=arm, model=model, assigned=assigned, error=error, pace=seconds, at=time.time(),
            )  # fmt: skip
            return timed, is_outcome and self.store.outcome(self.id, unit, arm, stopped, id)

        async def count() -> None:
            try:
                # in a thread of its own kind: promotions do not wait for a database that hangs
                timed, counted = await run_sync(write, limiter=self._one, abandon_on_cancel=True)
            except InputError as failed:
                log("failure", type="InputError", what="canary", message=str(failed)[:200])
                return
            if timed and seconds is not None:
                self.paces.add(arm, seconds)
            self._count(arm, answers=assigned, errors=assigned and error)
            if counted:
                self._count(arm, outcomes=1, successes=stopped)
            if error and arm == "new":
                self._failed.set()

        if len(self._writing) >= MOST_WRITING:
            log("failure", type="QueueFull", what="canary")
            return
        task = asyncio.create_task(count())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.wait((task,), timeout=WRITE_SECONDS)

    def record_feedback(self, feedback: "Feedback") -> None:
        """Count what somebody says, at any time, for the model that answered. For any thread but
        the event loop's. InputError: the database cannot be used."""
        new = self.store.count(feedback, self.config.metric)
        if new is not None and new[0] == self.id and self._loop is not None:
            _, arm, success = new
            self._loop.call_soon_threadsafe(lambda: self._count(arm, outcomes=1, successes=success))

    def _count(self, arm: str, **more: int) -> None:
        counts = self.arms[arm]
        added = {name: getattr(counts, name) + number for name, number in more.items()}
        self.arms[arm] = replace(counts, **added)
        self._changed.set()

    async def watch(self) -> None:
        """Look at the counts whenever they have changed, until they decide."""
        self._loop = asyncio.get_running_loop()
        while self.verdict is None:
            await self._changed.wait()
            self._changed.clear()
            counts = dict(self.arms), self.paces.counts, self.config
            self.tests = await asyncio.to_thread(comparisons, *counts)
            verdict = await asyncio.to_thread(judge, *counts)
            if verdict is not None and self.decide is not None and self.verdict is None:
                await self.decide(self, verdict)
                self._changed.set()  # unless that has ended it
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), LOOK_SECONDS)
            self._failed.clear()

    def end(self, verdict: CanaryVerdict) -> None:
        """What was decided, by `decide` or by somebody. The model is not held any longer."""
        self.verdict, self.canary = verdict, None
        self._changed.set()


class CanaryLease(ModelLease):
    """A request's use of one of the two models. ``assigned``: the experiment chose the model of
    conversation ``unit``, not the client."""

    def __init__(
        self, models: Models, served: Served, experiment: CanaryExperiment, unit: str,
        assigned: bool,
    ):  # fmt: skip
        super().__init__(models, served)
        self.experiment: CanaryExperiment | None = experiment
        self.unit, self.assigned = unit, assigned
        self.arm = "new" if served is experiment.canary else "old"
        self.began = time.perf_counter()

    def fall_back(self) -> bool:
        if self.arm != "new" or not self.assigned:
            return False
        self.served.release()
        self.served, self.arm = self.models.current, "old"
        self.served.acquire()
        return True

    async def refused(self, id: str) -> None:
        """Count a refusal against the canary."""
        experiment, self.experiment = self.experiment, None  # what follows belongs to no arm
        if experiment is not None:
            await experiment.answered(  # the id itself is that of the current model's answer
                f"refused-{id}", self.unit, None, "new", experiment.name, assigned=True, error=True
            )

    async def record(self, id: str, response: "ChatCompletionResponse | None") -> None:
        """Count an answer. The experiment knows its id before the client has all of it."""
        if self.experiment is None:
            return
        conversation, told = None, {"error": True}
        if response is not None:
            conversation = getattr(response.request, "conversation_id", None)
            tokens = sum(choice.tokens for choice in response.choices)
            told = {
                "seconds": (time.perf_counter() - self.began) / max(1, tokens),
                "stopped": all(choice.finish_reason != "length" for choice in response.choices),
            }
        await self.experiment.answered(
            id, self.unit, conversation, self.arm, self.served.name, assigned=self.assigned, **told
        )
