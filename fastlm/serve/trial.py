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
from fastlm.serve.gate import log
from fastlm.serve.plan import Plan
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.stats.latency import BOUND, PacePairs, PairCounts, compare_paces

if TYPE_CHECKING:
    from fastlm.serve.canary_store import CanaryStore
    from fastlm.serve.models import Served
    from fastlm.serve.said import Opinion

LOOK_SECONDS = 1.0  # between two looks: a test takes 20 ms of the interpreter
WRITE_SECONDS = 5.0  # that the end of an answer waits for the database at most
MOST_WRITING = 1024  # answers that wait for the database; more are not counted
Action = Literal["promote", "roll back", "keep"]


@dataclass(frozen=True)
class Arm:
    """What became of one model's conversations: ``successes`` of ``outcomes``, ``errors`` of
    ``answers``."""

    outcomes: int = 0
    successes: int = 0
    answers: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Rule:
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
class Verdict:
    """``rule``: None where somebody asked for it."""

    action: Action
    reason: str
    rule: Rule | None = None


@dataclass(frozen=True)
class Compared:
    """The difference new - old with its always-valid interval and p-value."""

    difference: float
    low: float
    high: float
    p: float


@lru_cache(64)  # most counts are those of the last look
def compare(old: tuple[int, int], new: tuple[int, int], alpha: float) -> Compared:
    """Compare (successes, number) of the two arms."""
    from fastlm.stats.sequential import always_valid

    return Compared(*always_valid(*new, *old, alpha))


def comparisons(arms: dict[str, Arm], pairs: PairCounts, plan: Plan) -> dict[str, Compared]:
    """Outcomes, errors and slowness, compared."""
    old, new = arms["old"], arms["new"]
    return {
        "outcome": compare(
            (old.successes, old.outcomes), (new.successes, new.outcomes), plan.alpha
        ),
        "errors": compare((old.errors, old.answers), (new.errors, new.answers), plan.alpha),
        "slow": Compared(*compare_paces(pairs, plan.alpha)),
    }


def judge(arms: dict[str, Arm], pairs: PairCounts, plan: Plan) -> Verdict | None:
    """What the counts decide; None: not yet."""
    old, new = arms["old"], arms["new"]
    rate = old.errors / old.answers if old.answers else 0.5
    if new.answers and new.errors / new.answers > rate:  # else it cannot be
        test = compare((old.errors, old.answers), (new.errors, new.answers), plan.alpha)
        if test.low > 0:
            counts = _shares("errors", (new.errors, new.answers), (old.errors, old.answers))
            rule = Rule("fewer errors", "errors", 0.0, plan.alpha, old.answers + new.answers)
            return _verdict("roll back", rule, test, counts)
    if pairs.new > pairs.old:
        test = Compared(*compare_paces(pairs, plan.alpha))
        if test.low > BOUND:
            counts = (
                f"slow answers: the new model slower in {pairs.new} of {pairs.total} pairs of"
                f" conversations, the old one in {pairs.old}"
            )
            rule = Rule("as fast", "slow", BOUND, plan.alpha, pairs.total)
            return _verdict("roll back", rule, test, counts)
    outcomes = old.outcomes + new.outcomes
    rule = Rule(plan.rule, "outcome", plan.bound, plan.alpha, outcomes, plan.metric)
    if old.outcomes and new.outcomes:
        test = compare((old.successes, old.outcomes), (new.successes, new.outcomes), plan.alpha)
        counts = _shares(plan.metric, (new.successes, new.outcomes), (old.successes, old.outcomes))
        if test.low > plan.bound:
            return _verdict("promote", rule, test, counts)
        if test.high < plan.bound:
            return _verdict("roll back", rule, test, counts)
    if outcomes >= plan.most:
        return Verdict("keep", f"{plan.metric}: no decision after {plan.most} outcomes", rule)
    return None


def _shares(name: str, new: tuple[int, int], old: tuple[int, int]) -> str:
    return f"{name}: {new[0]} of {new[1]} new, {old[0]} of {old[1]} old"


def _verdict(action: Action, rule: Rule, test: Compared, counts: str) -> Verdict:
    """``counts`` say what was counted; the reason also says which rule decided by which numbers."""
    side = "above" if test.low > rule.bound else "below"
    interval = f"{test.difference:+.3f} in [{test.low:+.3f}, {test.high:+.3f}]"
    return Verdict(
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
class Trial:
    """A canary on trial. ``decide`` is called in the event loop with a verdict, until `end` is.

    ``canary``: its model, None once it has ended, whose counts outlive the model.
    ``experiment``: its name in the database, new for each trial, and the salt of its hashes.
    ``tests``: `comparisons` as of the last look. ``paces``: of its conversations' first answers.
    ``same_tokens``: a token id means the same to both models. ``secret``: with which units are
    hashed for the database, so that nobody who has it can try what a prompt said.
    """

    canary: "Served | None"
    plan: Plan
    store: "CanaryStore"
    experiment: str
    same_tokens: bool = True
    secret: str = ""
    decide: Callable[["Trial", Verdict], Awaitable[Any]] | None = None
    verdict: Verdict | None = None
    arms: dict[str, Arm] = field(default_factory=lambda: {"old": Arm(), "new": Arm()})
    tests: dict[str, Compared] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.served.name
        self.arms = self.store.counts(self.experiment)
        self.paces = PacePairs()
        for arm, pace in self.store.first_paces(self.experiment):
            self.paces.add(arm, pace)
        self._changed = asyncio.Event()
        self._changed.set()  # what an earlier process counted may decide at once
        self._failed = asyncio.Event()  # the canary has: the next look does not wait
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing: set[asyncio.Task[None]] = set()
        self._one = CapacityLimiter(1)

    @property
    def served(self) -> "Served":
        """The canary's model, while the trial runs."""
        assert self.canary is not None
        return self.canary

    def takes(self, unit: str) -> bool:
        """Whether the canary gets this conversation."""
        return int(_hash(self.experiment, unit)[:13], 16) < self.plan.share * 16**13

    async def answered(
        self, id: str, unit: str, conversation: str | None, arm: str, model: str, *,
        assigned: bool, seconds: float | None = None, error: bool = False, stopped: bool = False,
    ) -> None:  # fmt: skip
        """Store and count an answer. ``seconds``: per token. A database that fails costs the trial
        an answer, and one that hangs the client `WRITE_SECONDS`; the answer is counted later."""
        unit = _hash(self.secret, unit)
        success = stopped if self.plan.metric == "stop" and assigned and not error else None

        def write() -> tuple[bool, bool]:
            timed = self.store.answer(
                response_id=id, experiment=self.experiment, unit=unit, conversation_id=conversation,
                arm=arm, model=model, assigned=assigned, error=error, pace=seconds, at=time.time(),
            )  # fmt: skip
            return timed, success is not None and self.store.outcome(
                self.experiment, unit, arm, success, id
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

    def opinion(self, opinion: "Opinion") -> None:
        """Count what somebody says, at any time, for the model that answered. For any thread but
        the event loop's. InputError: the database cannot be used."""
        new = self.store.count(opinion, self.plan.metric)
        if new is not None and new[0] == self.experiment and self._loop is not None:
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
            self.tests = await asyncio.to_thread(comparisons, arms, pairs, self.plan)
            verdict = await asyncio.to_thread(judge, arms, pairs, self.plan)
            if verdict is not None and self.decide is not None and self.verdict is None:
                await self.decide(self, verdict)
                self._changed.set()  # unless that has ended it
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), LOOK_SECONDS)
            self._failed.clear()

    def end(self, verdict: Verdict) -> None:
        """What was decided, by `decide` or by somebody. The model is not held any longer."""
        self.verdict, self.canary = verdict, None
        self._changed.set()
