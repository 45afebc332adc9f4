"""A model manager that runs a canary: it begins the experiment, and does what it decides."""

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.core import GaugeMetricFamily, Metric

from fastlm.errors import InputError
from fastlm.serve import loading
from fastlm.serve.api_error import ApiError
from fastlm.serve.canary.canary import CanaryExperiment
from fastlm.serve.canary.decision import CanaryConfig, CanaryVerdict, comparisons
from fastlm.serve.metrics import labelled
from fastlm.serve.middleware import log
from fastlm.serve.model_manager import Allowed, ModelManager, model_key, model_ref
from fastlm.serve.state import CanaryState, ModelRef

if TYPE_CHECKING:
    from fastlm.serve.canary.canary_store import CanaryStore
    from fastlm.serve.loading import Loader
    from fastlm.serve.responses import Feedback

STATUS = {"promote": "promoted", "roll back": "rolled back", "keep": "undecided"}


class CanaryManager(ModelManager):
    """``store``: where outcomes are counted; what is said after an experiment's end counts, too, by
    the metric of ``config``."""

    def __init__(
        self, loader: "Loader", base: str, path: Path, allowed: Allowed, store: "CanaryStore",
        config: CanaryConfig,
    ):  # fmt: skip
        super().__init__(loader, base, path, allowed)
        self.store, self.config = store, config
        self.experiment: CanaryExperiment | None = None  # also one that has ended

    def begin(self, canary: str | None = None) -> None:
        """Begin with the model at a path, or go on with its experiment, unless that has ended.

        InputError: a model that cannot be used.
        """
        if canary is None:
            return super().begin()
        current = self.models.current
        state = self._state_of(canary)
        self.state = replace(self.state, canary=state)
        if state.decided is not None or state.model.digest == current.digest:
            log("canary", model=state.model.path, status="decided before", action=state.decided)
        else:
            served = self.loader.load(Path(state.model.path), state.model.digest)
            try:
                loading.check_like(served, current)
            except InputError as error:
                raise InputError(f"canary: {error}") from None
            alike = loading.same_tokens(served.tokenizer, current.tokenizer)
            self.experiment = self.models.experiment = CanaryExperiment(
                served, self.config, self.store, state.experiment, alike, state.secret, self._decide
            )
        self.state.save(self.path)

    def _state_of(self, canary: str) -> CanaryState:
        """The experiment of the last start, or a new one where another canary is given, other
        files, or another metric, whose outcomes cannot be added to those of the old one."""
        model, last, metric = model_ref(canary), self.state.canary, self.config.metric
        if last is not None and last.model == model and (last.decided or last.metric == metric):
            return last
        if model.digest == self.state.current.digest:
            raise InputError(
                f"canary: expected another model than the one that is served, got {canary}"
            )
        return CanaryState(model, secrets.token_hex(8), metric, secret=secrets.token_hex(16))

    async def _end_experiment(self, action: Any, given: str | None) -> bool:
        if self.models.experiment is None or self.experiment is None:
            return False
        path = self.experiment.served.path
        if given is not None and model_key(given) != model_key(path):
            raise InputError(
                f"model: expected the canary, {path}, or a rollback of it first, got {given!r:.200}"
            )
        await self._end(self.experiment, CanaryVerdict(action, "asked"))
        return True

    async def _decide(self, experiment: CanaryExperiment, verdict: CanaryVerdict) -> None:
        """Do what an experiment has decided. A state file that cannot be written ends nothing: the
        experiment continues, and the next start decides again."""
        with contextlib.suppress(ApiError), self._change():
            try:
                await self._end(experiment, verdict)
            except InputError as error:
                log("failure", type="InputError", what="state", message=str(error)[:200])

    async def _end(self, experiment: CanaryExperiment, verdict: CanaryVerdict) -> None:
        numbers = await asyncio.to_thread(_numbers, experiment)
        state, canary, served = self.state, self.state.canary, experiment.served
        if canary is not None:
            state = replace(state, canary=replace(canary, decided=verdict.action))
        if verdict.rule is not None:
            numbers["rule"] = asdict(verdict.rule)
        if verdict.action == "promote":
            new = ModelRef(served.path, served.digest)
            state = replace(state, current=new, previous=state.current)
        told = {"model": served.name, "path": served.path, "reason": verdict.reason, **numbers}
        await self._save(state.with_decision(verdict.action, **told))
        if verdict.action == "promote":
            self.models.replace(served)
        else:
            self.models.end_experiment()
        experiment.end(verdict)

    def record_feedback(self, feedback: "Feedback") -> None:
        if self.experiment is not None:
            self.experiment.record_feedback(feedback)
        else:
            self.store.count(feedback, self.config.metric)

    def model_of(self, response_id: str) -> str | None:
        return self.store.model_of(response_id)

    async def status(self) -> dict[str, Any]:
        status, experiment = await super().status(), self.experiment
        if experiment is None:
            return status
        verdict = experiment.verdict
        return {
            **status,
            "status": "running" if verdict is None else STATUS[verdict.action],
            "canary": experiment.name,
            "reason": verdict and verdict.reason,
            "rule": verdict and verdict.rule and asdict(verdict.rule),
            "plan": asdict(experiment.config),
            **await asyncio.to_thread(_numbers, experiment),
        }

    def collect(self) -> Iterator[Metric]:
        yield from super().collect()
        experiment = self.experiment
        if experiment is None:
            return
        counts = {
            (arm, what): count
            for arm, counted in dict(experiment.arms).items()
            for what, count in asdict(counted).items()
        }
        counts |= {(arm, "slower"): getattr(experiment.paces.counts, arm) for arm in ("old", "new")}
        text = "What the canary's trial has counted"
        yield labelled(GaugeMetricFamily, "canary", text, ["arm", "what"], counts)
        share = 0.0 if experiment.canary is None else experiment.config.share
        yield GaugeMetricFamily("fastlm_canary_share", "Of conversations, of the canary", share)
        tests = {
            (name, what): value
            for name, test in experiment.tests.items()
            for what, value in test._asdict().items()
        }
        text = "Canary less old model, with its always-valid interval"
        yield labelled(GaugeMetricFamily, "canary_difference", text, ["test", "what"], tests)


def _numbers(experiment: CanaryExperiment) -> dict[str, Any]:
    arms, pairs = dict(experiment.arms), experiment.paces.counts
    tests = comparisons(arms, pairs, experiment.config)
    return {
        "experiment": experiment.id,
        "arms": {name: asdict(variant) for name, variant in arms.items()},
        "slower": asdict(pairs),
        "tests": {name: test._asdict() for name, test in tests.items()},
    }
