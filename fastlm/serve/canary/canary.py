"""A canary beside the model that is served: which conversations it gets, what became of them, and
whether it takes over.

A conversation stays with its model: a hash of its id, or of its client and its first messages,
says which one answers. It counts once, however often its answers are judged, since its answers
depend on each other. The tests are always valid (`fastlm.stats.sequential`), so each is asked after
every outcome.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from fastlm.errors import InputError
from fastlm.serve.canary.canary_config import CanaryConfig
from fastlm.serve.canary.canary_lease import CanaryLease
from fastlm.serve.middleware import log
from fastlm.serve.models import Models, Served
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.stats import sequential
from fastlm.stats.latency import BOUND, PacePairs, PairCounts, compare_paces

if TYPE_CHECKING:
    from fastlm.serve.canary.canary_store import CanaryStore
    from fastlm.serve.responses import Feedback

LOOK_SECONDS = 1.0  # between two looks: a test takes 20 ms of the interpreter
WRITE_SECONDS = 5.0  # that the end of an answer waits for the database at most
MOST_WRITING = 1024  # answers that wait for the database; more are not counted
Action = Literal["promote", "roll back", "keep"]


@dataclass(frozen=True)
class Variant:
    """What became of one model's conversations: ``successes`` of ``outcomes``, ``errors`` of
    ``answers``."""

    outcomes: int = 0
    successes: int = 0
    answers: int = 0
    errors: int = 0


@dataclass(frozen=True)
class DecisionRule:
    """The rule that decided: by the rule ``name`` the ``test`` of what was counted ("outcome",
    "errors", "slow") was on its side of ``bound``, at ``alpha``. ``after``: outcomes, answers or
    pairs of conversations; ``metric``: of outcomes."""

    name: str
    test: str
    bound: float
    alpha: float
    after: int
    metric: str | None = None


@dataclass(frozen=True)
class CanaryVerdict:
    """``rule``: None where somebody asked for it."""

    action: Action
    reason: str
    rule: DecisionRule | None = None


def comparisons(
    arms: dict[str, Variant], pairs: PairCounts, config: CanaryConfig
) -> dict[str, sequential.Answer]:
    """Compare outcomes, errors and slowness: each the difference new - old, with its always-valid
    interval and p-value."""
    old, new = arms["old"], arms["new"]
    return {
        "outcome": _compare(new.successes, new.outcomes, old.successes, old.outcomes, config.alpha),
        "errors": _compare(new.errors, new.answers, old.errors, old.answers, config.alpha),
        "slow": compare_paces(pairs, config.alpha),
    }


@lru_cache(64)  # most counts are those of the last look
def _compare(*counts: Any) -> sequential.Answer:
    return sequential.always_valid(*counts)


def judge(
    arms: dict[str, Variant], pairs: PairCounts, config: CanaryConfig
) -> CanaryVerdict | None:
    """Return what the counts decide; None: not yet. The guards come before the outcomes."""
    old, new = arms["old"], arms["new"]
    tests, alpha = comparisons(arms, pairs, config), config.alpha
    outcomes = old.outcomes + new.outcomes
    errors = _shares("errors", (new.errors, new.answers), (old.errors, old.answers))
    slow = (
        f"slow answers: the new model slower in {pairs.new} of {pairs.total} pairs of"
        f" conversations, the old one in {pairs.old}"
    )
    for rule, counts in (
        (DecisionRule("fewer errors", "errors", 0.0, alpha, old.answers + new.answers), errors),
        (DecisionRule("as fast", "slow", BOUND, alpha, pairs.total), slow),
    ):
        if tests[rule.test].low > rule.bound:
            return _verdict("roll back", rule, tests[rule.test], counts)
    rule = DecisionRule(config.rule, "outcome", config.bound, alpha, outcomes, config.metric)
    test = tests["outcome"]
    if old.outcomes and new.outcomes and not test.low <= config.bound <= test.high:
        counts = _shares(
            config.metric, (new.successes, new.outcomes), (old.successes, old.outcomes)
        )
        action: Action = "promote" if test.low > config.bound else "roll back"
        return _verdict(action, rule, test, counts)
    if outcomes >= config.most:
        return CanaryVerdict(
            "keep", f"{config.metric}: no decision after {config.most} outcomes", rule
        )
    return None


def _shares(name: str, new: tuple[int, int], old: tuple[int, int]) -> str:
    return f"{name}: {new[0]} of {new[1]} new, {old[0]} of {old[1]} old"


def _verdict(
    action: Action, rule: DecisionRule, test: sequential.Answer, counts: str
) -> CanaryVerdict:
    """``counts`` say what was counted; the reason also says which rule decided by which numbers."""
    side = "above" if test.low > rule.bound else "below"
    interval = f"{test.difference:+.3f} in [{test.low:+.3f}, {test.high:+.3f}]"
    return CanaryVerdict(
        action,
        f"{counts}; difference {interval}, {side} the bound {rule.bound:g} of the rule"
        f" {rule.name!r} at alpha {rule.alpha:g}",
        rule,
    )


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
    arms: dict[str, Variant] = field(default_factory=lambda: {"old": Variant(), "new": Variant()})
    tests: dict[str, sequential.Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.served.name
        self.arms = self.store.counts(self.id)
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
    ) -> CanaryLease:
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
        success = stopped if self.config.metric == "stop" and assigned and not error else None

        def write() -> tuple[bool, bool]:
            timed = self.store.answer(
                response_id=id, experiment=self.id, unit=unit, conversation_id=conversation,
                arm=arm, model=model, assigned=assigned, error=error, pace=seconds, at=time.time(),
            )  # fmt: skip
            return timed, success is not None and self.store.outcome(
                self.id, unit, arm, success, id
            )

        async def count() -> None:
            try:
                # in a thread of its own kind: promotions do not wait for a database that hangs
                timed, counted = await run_sync(write, limiter=self._one, abandon_on_cancel=True)
            except InputError as failed:
                log("failure", type="InputError", what="canary", message=str(failed)[:200])
                return
            have = self.arms[arm]
            self.arms[arm] = replace(
                have,
                answers=have.answers + assigned,
                errors=have.errors + (assigned and error),
            )
            if timed and seconds is not None:
                self.paces.add(arm, seconds)
            if counted:
                self._count(arm, bool(success))
            self._changed.set()
            if error and arm == "new":
                self._failed.set()

        if len(self._writing) >= MOST_WRITING:
            log("failure", type="QueueFull", what="canary")
            return
        task = asyncio.create_task(count())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.wait((task,), timeout=WRITE_SECONDS)

    def feedback(self, opinion: "Feedback") -> None:
        """Count what somebody says, at any time, for the model that answered. For any thread but
        the event loop's. InputError: the database cannot be used."""
        new = self.store.count(opinion, self.config.metric)
        if new is not None and new[0] == self.id and self._loop is not None:
            self._loop.call_soon_threadsafe(self._count, *new[1:])

    def _count(self, arm: str, success: bool) -> None:
        have = self.arms[arm]
        self.arms[arm] = replace(
            have, outcomes=have.outcomes + 1, successes=have.successes + success
        )
        self._changed.set()

    async def watch(self) -> None:
        """Look at the counts whenever they have changed, until they decide."""
        self._loop = asyncio.get_running_loop()
        while self.verdict is None:
            await self._changed.wait()
            self._changed.clear()
            arms, pairs = dict(self.arms), self.paces.counts
            self.tests = await asyncio.to_thread(comparisons, arms, pairs, self.config)
            verdict = await asyncio.to_thread(judge, arms, pairs, self.config)
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
