"""Run an experiment with a canary: assign conversations to it, and count their outcomes.

A conversation stays with its model: a hash of its id, or of its client and first messages, chooses
the model. Each conversation counts once, since its answers depend on each other.
`fastlm.serve.canary.decision` decides from the counts.
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
from fastlm.serve.canary.decision import (
    CanaryConfig,
    CanaryVerdict,
    Variant,
    comparisons,
    evaluate_counts,
)
from fastlm.serve.middleware import log
from fastlm.serve.models import ModelLease, ServedModel, ServedModels
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.stats.latency import PacePairs
from fastlm.stats.sequential import SequentialResult

if TYPE_CHECKING:
    from fastlm.serve.canary.canary_store import CanaryStore
    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.feedback import Feedback

CHECK_SECONDS = 1.0  # between two checks: the tests take 20 ms of the interpreter
WRITE_SECONDS = 5.0  # for which the end of a response waits for the database at most
MAX_PENDING_WRITES = 1024  # responses that wait for the database; more are not counted


def assignment_unit(request: GenerationRequest, client: str) -> str:
    """Return the hash of what is assigned to one model as a unit: a conversation by its id, else by
    its client and its messages up to the first of a user; a text by its client and its prompt."""
    if isinstance(request, ChatCompletionRequest):
        if request.conversation_id is not None:
            return _hash("id", request.conversation_id)
        count = next((i for i, m in enumerate(request.messages, 1) if m["role"] == "user"), None)
        return _hash("chat", client, json.dumps(request.messages[:count], sort_keys=True))
    assert isinstance(request, CompletionRequest)
    return _hash("text", client, json.dumps(request.prompts[0]))


def has_token_ids(request: GenerationRequest) -> bool:
    """Return whether a request contains token ids."""
    has_ids = isinstance(request, CompletionRequest) and any(
        isinstance(prompt, list) for prompt in request.prompts
    )
    return has_ids or bool(request.stop_token_ids or request.logit_bias)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


@dataclass(eq=False)
class CanaryExperiment:
    """An experiment with a canary. The event loop calls ``decide`` with each verdict until `end` is
    called.

    ``canary``: its model; None once the experiment has ended, while its counts remain.
    ``id``: a unique name in the database, and the salt of the assignment.
    ``tests``: the result of `comparisons` at the last check. ``paces``: seconds per token of the
    conversations' first answers. ``same_vocabulary``: a token id means the same to both models.
    ``secret``: the key of the units' hashes in the database, so that its owner cannot test guesses
    about prompts.
    """

    canary: ServedModel | None
    config: CanaryConfig
    store: "CanaryStore"
    id: str
    same_vocabulary: bool = True
    secret: str = ""
    decide: Callable[["CanaryExperiment", CanaryVerdict], Awaitable[Any]] | None = None
    verdict: CanaryVerdict | None = None
    tests: dict[str, SequentialResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.served_model.name
        self.arms: dict[str, Variant] = self.store.counts(self.id)
        self.paces = PacePairs()
        for arm, pace in self.store.first_paces(self.id):
            self.paces.add(arm, pace)
        self._changed = asyncio.Event()
        self._changed.set()  # the counts of an earlier process may decide at once
        self._canary_failed = asyncio.Event()  # makes the next check come at once
        self._loop: asyncio.AbstractEventLoop | None = None
        self._write_tasks: set[asyncio.Task[None]] = set()
        self._write_limiter = CapacityLimiter(1)

    @property
    def served_model(self) -> ServedModel:
        """The canary's model, while the experiment runs."""
        assert self.canary is not None
        return self.canary

    def lease(
        self,
        models: ServedModels,
        served_model: ServedModel,
        request: GenerationRequest,
        client: str,
    ) -> "CanaryLease":
        """Choose the model of a request. A request with token ids goes to the current model if they
        mean something else to the canary."""
        unit = assignment_unit(request, client)
        assigned = request.model == models.name and (
            self.same_vocabulary or not has_token_ids(request)
        )
        if assigned and self.is_canary(unit):
            served_model = self.served_model
        return CanaryLease(models, served_model, self, unit, assigned)

    def is_canary(self, unit: str) -> bool:
        """Return whether the canary answers this conversation."""
        return int(_hash(self.id, unit)[:13], 16) < self.config.share * 16**13

    async def record_response(
        self, id: str, unit: str, conversation: str | None, arm: str, model: str, *,
        assigned: bool, seconds: float | None = None, error: bool = False, stopped: bool = False,
    ) -> None:  # fmt: skip
        """Store and count a response. ``seconds``: per token.

        If the database fails, the experiment loses the response. If it hangs, the client waits
        `WRITE_SECONDS`, and the response is counted later.
        """
        unit = _hash(self.secret, unit)
        is_outcome = self.config.metric == "stop" and assigned and not error

        def write() -> tuple[bool, bool]:
            is_first_timed = self.store.add_answer(
                response_id=id, experiment=self.id, unit=unit, conversation_id=conversation,
                arm=arm, model=model, assigned=assigned, error=error, seconds_per_token=seconds,
                at=time.time(),
            )  # fmt: skip
            is_new = is_outcome and self.store.add_outcome(self.id, unit, arm, stopped, id)
            return is_first_timed, is_new

        async def count() -> None:
            try:
                # a limiter of its own, so that promotions do not wait for a database that hangs
                is_first_timed, is_new_outcome = await run_sync(
                    write, limiter=self._write_limiter, abandon_on_cancel=True
                )
            except InputError as failure:
                log("failure", type="InputError", what="canary", message=str(failure)[:200])
                return
            if is_first_timed and seconds is not None:
                self.paces.add(arm, seconds)
            self._count(arm, answers=assigned, errors=assigned and error)
            if is_new_outcome:
                self._count(arm, outcomes=1, successes=stopped)
            if error and arm == "new":
                self._canary_failed.set()

        if len(self._write_tasks) >= MAX_PENDING_WRITES:
            log("failure", type="QueueFull", what="canary")
            return
        task = asyncio.create_task(count())
        self._write_tasks.add(task)
        task.add_done_callback(self._write_tasks.discard)
        await asyncio.wait((task,), timeout=WRITE_SECONDS)

    def record_feedback(self, feedback: "Feedback") -> None:
        """Count feedback for the model that answered, at any time. Any thread but the event loop's
        may call it. InputError: the database cannot be used."""
        new = self.store.add_feedback(feedback, self.config.metric)
        if new is not None and new[0] == self.id and self._loop is not None:
            _, arm, success = new
            self._loop.call_soon_threadsafe(lambda: self._count(arm, outcomes=1, successes=success))

    def _count(self, arm: str, **increments: int) -> None:
        counts = self.arms[arm]
        sums = {name: getattr(counts, name) + count for name, count in increments.items()}
        self.arms[arm] = replace(counts, **sums)
        self._changed.set()

    async def watch(self) -> None:
        """Test the counts whenever they have changed, until there is a verdict."""
        self._loop = asyncio.get_running_loop()
        while self.verdict is None:
            await self._changed.wait()
            self._changed.clear()
            counts = dict(self.arms), self.paces.counts, self.config
            self.tests = await asyncio.to_thread(comparisons, *counts)
            verdict = await asyncio.to_thread(evaluate_counts, *counts)
            if verdict is not None and self.decide is not None and self.verdict is None:
                await self.decide(self, verdict)
                self._changed.set()  # check again, unless `decide` has ended the experiment
            with suppress(TimeoutError):
                await asyncio.wait_for(self._canary_failed.wait(), CHECK_SECONDS)
            self._canary_failed.clear()

    def end(self, verdict: CanaryVerdict) -> None:
        """End the experiment with a verdict, of `decide` or of an admin, and release its model."""
        self.verdict, self.canary = verdict, None
        self._changed.set()


class CanaryLease(ModelLease):
    """Holds one of the two models for a request. ``assigned``: the experiment chose the model for
    the conversation ``unit``; False: the client named it."""

    def __init__(
        self, models: ServedModels, served_model: ServedModel, experiment: CanaryExperiment,
        unit: str, assigned: bool,
    ):  # fmt: skip
        super().__init__(models, served_model)
        self.experiment: CanaryExperiment | None = experiment
        self.unit, self.assigned = unit, assigned
        self.arm = "new" if served_model is experiment.canary else "old"
        self.start = time.perf_counter()

    def fall_back(self) -> bool:
        if self.arm != "new" or not self.assigned:
            return False
        self.served_model.release()
        self.served_model, self.arm = self.models.current, "old"
        self.served_model.acquire()
        return True

    async def record_refusal(self, id: str) -> None:
        """Count a refusal as an error of the canary."""
        experiment, self.experiment = self.experiment, None  # the answer belongs to no arm
        if experiment is not None:
            await experiment.record_response(  # the current model's response has the id itself
                f"refused-{id}", self.unit, None, "new", experiment.name, assigned=True, error=True
            )

    async def record_outcome(self, id: str, response: "ChatCompletionResponse | None") -> None:
        """Count a response. The experiment stores its id before the client has all of it."""
        if self.experiment is None:
            return
        conversation, result = None, {"error": True}
        if response is not None:
            conversation = getattr(response.request, "conversation_id", None)
            tokens = sum(choice.tokens for choice in response.choices)
            result = {
                "seconds": (time.perf_counter() - self.start) / max(1, tokens),
                "stopped": all(choice.finish_reason != "length" for choice in response.choices),
            }
        await self.experiment.record_response(
            id,
            self.unit,
            conversation,
            self.arm,
            self.served_model.name,
            assigned=self.assigned,
            **result,
        )
