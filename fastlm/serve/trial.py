"""A canary beside the model that is served: which conversations it gets, what became of them, and
whether it takes over.

A conversation stays with its model: a hash of its id, or of its client and its first messages,
says which one answers. It counts once, however often its answers are judged, since its answers
depend on each other. The tests are always valid (`fastlm.evals.sequential`), so each is asked after
every outcome.
"""

import asyncio
import hashlib
import json
import statistics
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
from fastlm.serve.openai_api import Asked, ChatAsked, TextAsked
from fastlm.serve.plan import Plan

if TYPE_CHECKING:
    from fastlm.serve.canary_store import CanaryStore
    from fastlm.serve.models import Served
    from fastlm.serve.said import Opinion

WARM_UP = 20  # answers of the old model, whose median says what is slow
SLOWER = 2.0  # times that median per token: a slow answer
MORE_SLOW = 0.25  # so many more answers of the canary than of the old model may be slow
LOOK_SECONDS = 1.0  # between two looks: a test takes 20 ms of the interpreter
WRITE_SECONDS = 5.0  # that the end of an answer waits for the database at most
MOST_WRITING = 1024  # answers that wait for the database; more are not counted
Action = Literal["promote", "roll back", "keep"]


@dataclass(frozen=True)
class Arm:
    """What became of one model's conversations: ``successes`` of ``outcomes``, ``errors`` of
    ``answers``, ``slow`` of ``timed``."""

    outcomes: int = 0
    successes: int = 0
    answers: int = 0
    errors: int = 0
    timed: int = 0
    slow: int = 0


@dataclass(frozen=True)
class Verdict:
    action: Action
    reason: str


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
    from fastlm.evals.sequential import always_valid

    return Compared(*always_valid(*new, *old, alpha))


def comparisons(arms: dict[str, Arm], plan: Plan) -> dict[str, Compared]:
    """Outcomes, errors and slowness, compared."""
    old, new = arms["old"], arms["new"]
    return {
        "outcome": compare(
            (old.successes, old.outcomes), (new.successes, new.outcomes), plan.alpha
        ),
        "errors": compare((old.errors, old.answers), (new.errors, new.answers), plan.alpha),
        "slow": compare((old.slow, old.timed), (new.slow, new.timed), plan.alpha),
    }


def judge(arms: dict[str, Arm], plan: Plan) -> Verdict | None:
    """What the counts decide; None: not yet."""
    old, new = arms["old"], arms["new"]
    for name, bad, of, bound in (("errors", "errors", "answers", 0.0),
                                 ("slow answers", "slow", "timed", MORE_SLOW)):  # fmt: skip
        a, n = (getattr(old, bad), getattr(old, of)), (getattr(new, bad), getattr(new, of))
        if n[1] and n[0] / n[1] - (a[0] / a[1] if a[1] else 0.5) > bound:  # else it cannot be
            test = compare(a, n, plan.alpha)
            if test.low > bound:
                return Verdict("roll back", f"{name}: {_told(test)}, above {bound:g}")
    if old.outcomes and new.outcomes:
        test = compare((old.successes, old.outcomes), (new.successes, new.outcomes), plan.alpha)
        told = f"{plan.metric}: {_told(test)}"
        if test.low > plan.bound:
            return Verdict("promote", f"{told}, above {plan.bound:g}")
        if test.high < plan.bound:
            return Verdict("roll back", f"{told}, below {plan.bound:g}")
    if old.outcomes + new.outcomes >= plan.most:
        return Verdict("keep", f"{plan.metric}: no decision after {plan.most} outcomes")
    return None


def _told(test: Compared) -> str:
    return f"{test.difference:+.3f} in [{test.low:+.3f}, {test.high:+.3f}]"


def unit_of(asked: Asked, client: str) -> str:
    """What stays with one model, as a hash: a conversation by its id, else by its client and its
    messages up to the first of a user; a text by its client and its beginning."""
    if isinstance(asked, ChatAsked):
        if asked.conversation_id is not None:
            return _hash("id", asked.conversation_id)
        count = next((i for i, m in enumerate(asked.messages, 1) if m["role"] == "user"), None)
        return _hash("chat", client, json.dumps(asked.messages[:count], sort_keys=True))
    assert isinstance(asked, TextAsked)
    return _hash("text", client, json.dumps(asked.prompts[0]))


def uses_ids(asked: Asked) -> bool:
    """Whether a request has token ids in it."""
    listed = isinstance(asked, TextAsked) and any(isinstance(p, list) for p in asked.prompts)
    return listed or bool(asked.stop_ids or asked.sampling.logit_bias)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


@dataclass(eq=False)
class Trial:
    """A canary on trial. ``decide`` is called in the event loop with a verdict, until `end` is.

    ``canary``: its model, None once it has ended, whose counts outlive the model.
    ``experiment``: its name in the database, new for each trial, and the salt of its hashes.
    ``tests``: `comparisons` as of the last look.
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
        self._first = self.store.first_paces(self.experiment, WARM_UP)
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

    @property
    def slow_pace(self) -> float | None:
        """Seconds per token above which an answer is slow; None: not known yet."""
        if len(self._first) < WARM_UP:
            return None
        return SLOWER * statistics.median(self._first)

    async def answered(
        self, id: str, unit: str, conversation: str | None, arm: str, model: str, *,
        assigned: bool, seconds: float | None = None, error: bool = False, stopped: bool = False,
    ) -> None:  # fmt: skip
        """Store and count an answer. ``seconds``: per token. A database that fails costs the trial
        an answer, and one that hangs the client `WRITE_SECONDS`; the answer is counted later."""
        unit, slow = _hash(self.secret, unit), None
        if seconds is not None and self.slow_pace is not None:
            slow = seconds > self.slow_pace
        elif seconds is not None and arm == "old":
            self._first.append(seconds)
        success = stopped if self.plan.metric == "stop" and assigned and not error else None

        def write() -> bool:
            self.store.answer(
                response_id=id, experiment=self.experiment, unit=unit, conversation_id=conversation,
                arm=arm, model=model, assigned=assigned, error=error, pace=seconds, slow=slow,
                at=time.time(),
            )  # fmt: skip
            return success is not None and self.store.outcome(
                self.experiment, unit, arm, success, id
            )

        async def count() -> None:
            try:
                # in a thread of its own kind: promotions do not wait for a database that hangs
                counted = await run_sync(write, limiter=self._one, abandon_on_cancel=True)
            except InputError as failed:
                log("failure", type="InputError", what="canary", message=str(failed)[:200])
                return
            have = self.arms[arm]
            self.arms[arm] = replace(
                have,
                answers=have.answers + assigned,
                errors=have.errors + (assigned and error),
                timed=have.timed + (assigned and slow is not None),
                slow=have.slow + bool(assigned and slow),
            )
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
            arms = dict(self.arms)
            self.tests = await asyncio.to_thread(comparisons, arms, self.plan)
            verdict = await asyncio.to_thread(judge, arms, self.plan)
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
