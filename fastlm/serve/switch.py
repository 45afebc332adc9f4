"""Promotions and rollbacks in a running server: a new model is loaded beside the old one, new
requests go to it, and the old one is freed when its answers have ended.

One change at a time: a second one is refused while the first is being made.
"""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.serve import loading
from fastlm.serve.api_error import ApiError
from fastlm.serve.gate import log
from fastlm.serve.models import Models, Served
from fastlm.serve.plan import Plan
from fastlm.serve.state import Canary, Known, State, read_state
from fastlm.serve.trial import Trial, Verdict, comparisons

if TYPE_CHECKING:
    from fastlm.serve.canary_store import CanaryStore
    from fastlm.serve.loading import Loader
    from fastlm.serve.said import Opinion

Check = Callable[[Path, Served], None]
"""Raises InputError where the model at a path, which is loaded, may not be promoted."""


class Allowed:
    """Which models may be promoted: those named at the start, and what is below ``folder``."""

    def __init__(self, named: Sequence[str], folder: Path | None):
        self.named = {_key(path) for path in named}
        self.folder = None if folder is None else folder.resolve()

    def find(self, given: str) -> str:
        """The path that is meant; a relative one is below the folder. InputError: not allowed,
        whether or not anything is there."""
        if given and "\0" not in given:
            if _key(given) in self.named:
                return given
            if self.folder is not None and not given.startswith("model:"):
                path = (self.folder / given).resolve()  # an absolute one replaces the folder
                if path != self.folder and path.is_relative_to(self.folder):
                    return str(path)
        below = "" if self.folder is None else ", or one below --models-dir"
        raise InputError(f"model: wanted one that was named at start{below}, got {given!r:.200}")


def _key(path: str) -> str:
    return path if path.startswith("model:") else str(Path(path).resolve())


class Switch:
    """Changes ``models`` as it is asked to, or as a trial decides.

    ``path``: of the state file. ``checks``: of a model that is to be promoted, after those of
    `fastlm.serve.loading.Loader.beside`. ``store``: where trials are counted; what is said after
    their end counts, too, by ``metric``.
    """

    def __init__(
        self,
        models: Models,
        loader: "Loader",
        state: State,
        path: Path,
        allowed: Allowed,
        checks: Sequence[Check] = (),
        store: "CanaryStore | None" = None,
        metric: str = "thumb",
    ):
        self.models, self.loader, self.state, self.path = models, loader, state, path
        self.allowed, self.checks = allowed, list(checks)
        self.store, self.metric = store, metric
        self.trial: Trial | None = models.trial  # also one that has ended
        if self.trial is not None:
            self.trial.decide = self._decide
        self.made: Counter[str] = Counter()  # decisions of this process
        self._busy = False

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

    async def promote(self, given: str | None, *, other_tokens: bool = False) -> None:
        """Let the model at a path answer, or the canary (None, or its path). ``other_tokens``: also
        if its token ids mean something else. InputError, ApiError: it is refused; the old model
        answers as before."""
        with self._change():
            trial = self.models.trial
            if trial is not None:
                if given is not None and _key(given) != _key(trial.served.path):
                    raise InputError(
                        f"model: wanted the canary, {trial.served.path}, or a rollback of it first,"
                        f" got {given!r:.200}"
                    )
                await self._end(trial, Verdict("promote", "asked"))
                return
            if given is None:
                raise InputError("model: wanted a path, got none, and no canary runs")
            await self._load(self.allowed.find(given), "promote", other_tokens=other_tokens)

    async def rollback(self) -> None:
        """End the canary, or go back to the model before the last promotion, once. As `promote`."""
        with self._change():
            if (trial := self.models.trial) is not None:
                await self._end(trial, Verdict("roll back", "asked"))
                return
            if (previous := self.state.previous) is None:
                raise InputError("wanted a promotion to undo, got none (or one undone already)")
            await self._load(previous.path, "roll back", previous.digest, other_tokens=True)

    async def _load(
        self, path: str, action: str, digest: str | None = None, *, other_tokens: bool
    ) -> None:
        """``digest``: the files must be those that they were."""
        old = self.models.current

        def load() -> Served:
            if digest is not None and loading.digest_of(Path(path)) != digest:
                raise InputError(f"{path}: wanted what was served before, its files have changed")
            new = self.loader.beside(Path(path), old)
            try:
                if not other_tokens and not loading.same_tokens(new.tokenizer, old.tokenizer):
                    raise InputError(
                        "model: expected the tokens of the current model, in which clients may send"
                        " ids, got another tokenizer (--other-tokens: promote it all the same)"
                    )
                for check in self.checks:
                    check(Path(path), new)
            except BaseException:
                new.engine.close()
                raise
            return new

        new = await asyncio.to_thread(load)
        known = Known(new.path, new.digest)
        # what was rolled back is not gone back to: the command may be given twice
        previous = self.state.current if action == "promote" else None
        state = replace(self.state, current=known, previous=previous)
        try:
            await self._save(state.decided(action, model=new.name, path=path, reason="asked"))
        except BaseException:
            new.engine.close()
            raise
        self.models.replace(new)

    async def _decide(self, trial: Trial, verdict: Verdict) -> None:
        """Do what a trial has decided. A state file that cannot be written ends nothing: the trial
        goes on, and the next start decides again."""
        with contextlib.suppress(ApiError), self._change():
            try:
                await self._end(trial, verdict)
            except InputError as error:
                log("failure", type="InputError", what="state", message=str(error)[:200])

    async def _end(self, trial: Trial, verdict: Verdict) -> None:
        numbers = await asyncio.to_thread(self._numbers, trial)
        state, canary, served = self.state, self.state.canary, trial.served
        if canary is not None:
            state = replace(state, canary=replace(canary, decided=verdict.action))
        if verdict.rule is not None:
            numbers["rule"] = asdict(verdict.rule)
        if verdict.action == "promote":
            known = Known(served.path, served.digest)
            state = replace(state, current=known, previous=state.current)
        await self._save(
            state.decided(
                verdict.action, model=served.name, path=served.path, reason=verdict.reason,
                **numbers,
            )
        )  # fmt: skip
        if verdict.action == "promote":
            self.models.replace(served)
        else:
            self.models.end_trial()
        trial.end(verdict)

    async def _save(self, state: State) -> None:
        await asyncio.to_thread(state.save, self.path)
        self.state = state
        told = state.decisions[-1]
        self.made[told["action"]] += 1
        log("decision", **{key: value for key, value in told.items() if key != "at"})

    @staticmethod
    def _numbers(trial: Trial) -> dict[str, Any]:
        arms, pairs = dict(trial.arms), trial.paces.counts
        tests = comparisons(arms, pairs, trial.plan)
        return {
            "experiment": trial.experiment,
            "arms": {name: asdict(arm) for name, arm in arms.items()},
            "slower": asdict(pairs),
            "tests": {name: asdict(test) for name, test in tests.items()},
        }

    def opinion(self, opinion: "Opinion") -> None:
        """Count what somebody says for the model that answered. For any thread but the event
        loop's. InputError: the database cannot be used."""
        if self.trial is not None:
            self.trial.opinion(opinion)
        elif self.store is not None:
            self.store.count(opinion, self.metric)

    def model_of(self, response_id: str) -> str | None:
        """The name of the model that gave an answer, where it is known."""
        return None if self.store is None else self.store.model_of(response_id)

    async def told(self) -> dict[str, Any]:
        """What `GET /v1/canary` answers."""
        trial = self.trial
        told: dict[str, Any] = {
            "object": "canary", "status": "none", "model": self.models.current.name,
            "path": self.state.current.path,
            "previous": self.state.previous and self.state.previous.path,
            "leaving": [served.name for served in self.models.leaving],
        }  # fmt: skip
        if trial is not None:
            status = {"promote": "promoted", "roll back": "rolled back", "keep": "undecided"}
            told |= {
                "status": "running" if trial.verdict is None else status[trial.verdict.action],
                "canary": trial.name,
                "reason": trial.verdict and trial.verdict.reason,
                "rule": trial.verdict and trial.verdict.rule and asdict(trial.verdict.rule),
                "plan": asdict(trial.plan),
                **await asyncio.to_thread(self._numbers, trial),
            }
        return {**told, "decisions": self.state.decisions}


def start_models(
    loader: "Loader",
    base: str,
    path: Path,
    *,
    canary: str | None = None,
    plan: Plan | None = None,
    store: "CanaryStore | None" = None,
) -> tuple[Models, State]:
    """Load what the last decision left at the state file ``path``: the model ``base``, or what was
    promoted in its place; and the canary, unless its trial has ended.

    InputError: a model that cannot be used, or is no longer what was decided on.
    """
    base = _key(base)
    state = read_state(path)
    if state is None or state.base != base:
        state = State(base, Known(base, loading.digest_of(Path(base))))
    elif _digest(state.current.path, path) != state.current.digest:
        if state.current.path != base or state.previous is not None:
            raise InputError(
                f"{path}: wanted {state.current.path} as it was when it was promoted, its files"
                " have changed (delete the file to begin with --model)"
            )
        state = State(base, Known(base, loading.digest_of(Path(base))))  # trained again
    current = loader.load(Path(state.current.path), state.current.digest)
    models, trial = Models(current, loader.name), None
    state = replace(state, canary=_canary(state, canary, plan))
    if canary is not None and state.canary is not None:
        assert plan is not None and store is not None
        known, experiment = state.canary.model, state.canary.experiment
        if state.canary.decided is not None or known.digest == current.digest:
            log("canary", model=known.path, status="decided before", action=state.canary.decided)
        else:
            served = loader.load(Path(known.path), known.digest)
            try:
                loading.check_like(served, current)
            except InputError as error:
                raise InputError(f"canary: {error}") from None
            alike = loading.same_tokens(served.tokenizer, current.tokenizer)
            trial = Trial(served, plan, store, experiment, alike, state.canary.secret)
            models.begin(trial)
    state.save(path)
    return models, state


def _digest(model: str, path: Path) -> str:
    """The digest of the model that the state file ``path`` names."""
    try:
        return loading.digest_of(Path(model))
    except InputError as error:
        raise InputError(
            f"{path}: expected the model that was promoted last, {model}, got: {error} (put it"
            " back, or delete the state file to begin with --model)"
        ) from None


def _canary(state: State, given: str | None, plan: Plan | None) -> Canary | None:
    """The trial of a state, or a new one where another canary is given, other files, or another
    metric, whose outcomes cannot be added to those of the old one."""
    if given is None or plan is None:
        return None
    model = Known(_key(given), loading.digest_of(Path(_key(given))))
    old = state.canary
    if old is not None and old.model == model and (old.decided or old.metric == plan.metric):
        return old
    if model.digest == state.current.digest:
        raise InputError(f"canary: wanted another model than the one that is served, got {given}")
    return Canary(model, secrets.token_hex(8), plan.metric, secret=secrets.token_hex(16))
