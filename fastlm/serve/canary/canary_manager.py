"""A model manager that runs a canary: it starts the experiment and carries out its decision."""

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
from fastlm.serve.metrics import metric_family
from fastlm.serve.middleware import log
from fastlm.serve.model_manager import AllowedModels, ModelManager, model_key, model_ref
from fastlm.serve.state import CanaryState, ModelRef

if TYPE_CHECKING:
    from fastlm.serve.canary.canary_store import CanaryStore
    from fastlm.serve.feedback import Feedback
    from fastlm.serve.loading import ModelLoader

STATUS = {"promote": "promoted", "roll back": "rolled back", "keep": "undecided"}


class CanaryManager(ModelManager):
    """Runs the experiment of ``config``. ``store``: counts outcomes, also of feedback that comes
    after the end of the experiment."""

    def __init__(
        self, loader: "ModelLoader", base: str, path: Path, allowed: AllowedModels,
        store: "CanaryStore", config: CanaryConfig,
    ):  # fmt: skip
        super().__init__(loader, base, path, allowed)
        self.store, self.config = store, config
        self.experiment: CanaryExperiment | None = None  # None before the first, kept after its end

    def start(self, canary: str | None = None) -> None:
        """Start an experiment with the model at a path, or continue it, unless it has ended.

        InputError: the model cannot be used.
        """
        if canary is None:
            return super().start()
        current = self.models.current
        state = self._restore_state(canary)
        self.state = replace(self.state, canary=state)
        if state.decision is not None or state.model.digest == current.digest:
            log("canary", model=state.model.path, status="decided earlier", action=state.decision)
        else:
            served_model = self.loader.load(Path(state.model.path), state.model.digest)
            try:
                loading.check_compatible(served_model, current)
            except InputError as error:
                raise InputError(f"canary: {error}") from None
            same_vocabulary = loading.same_vocabulary(served_model.tokenizer, current.tokenizer)
            self.experiment = self.models.experiment = CanaryExperiment(
                served_model,
                self.config,
                self.store,
                state.experiment,
                same_vocabulary,
                state.secret,
                self._decide,
            )
        self.state.save(self.path)

    def _restore_state(self, canary: str) -> CanaryState:
        """Return the state of the last experiment, or that of a new one if the canary's path, its
        files or the metric differ: their outcomes cannot be added."""
        model, last, metric = model_ref(canary), self.state.canary, self.config.metric
        if last is not None and last.model == model and (last.decision or last.metric == metric):
            return last
        if model.digest == self.state.current.digest:
            raise InputError(f"canary: expected another model than the current one, got {canary}")
        return CanaryState(model, secrets.token_hex(8), metric, secret=secrets.token_hex(16))

    async def _end_experiment(self, action: Any, path: str | None) -> bool:
        if self.models.experiment is None or self.experiment is None:
            return False
        canary = self.experiment.served_model.path
        if path is not None and model_key(path) != model_key(canary):
            raise InputError(
                f"model: expected the canary, {canary}, or a rollback of it first, got"
                f" {path!r:.200}"
            )
        await self._end(self.experiment, CanaryVerdict(action, "requested"))
        return True

    async def _decide(self, experiment: CanaryExperiment, verdict: CanaryVerdict) -> None:
        """Carry out the verdict of an experiment. If the state file cannot be written, the
        experiment continues, and the next start decides again."""
        with contextlib.suppress(ApiError), self._change():
            try:
                await self._end(experiment, verdict)
            except InputError as error:
                log("failure", type="InputError", what="state", message=str(error)[:200])

    async def _end(self, experiment: CanaryExperiment, verdict: CanaryVerdict) -> None:
        numbers = await asyncio.to_thread(_numbers, experiment)
        state, canary, served_model = self.state, self.state.canary, experiment.served_model
        if canary is not None:
            state = replace(state, canary=replace(canary, decision=verdict.action))
        if verdict.rule is not None:
            numbers["rule"] = asdict(verdict.rule)
        if verdict.action == "promote":
            new = ModelRef(served_model.path, served_model.digest)
            state = replace(state, current=new, previous=state.current)
        fields = {"model": served_model.name, "path": served_model.path, "reason": verdict.reason}
        await self._save(state.with_decision(verdict.action, **fields, **numbers))
        if verdict.action == "promote":
            self.models.replace(served_model)
        else:
            self.models.end_experiment()
        experiment.end(verdict)

    def record_feedback(self, feedback: "Feedback") -> None:
        if self.experiment is not None:
            self.experiment.record_feedback(feedback)
        else:
            self.store.add_feedback(feedback, self.config.metric)

    def model_name(self, response_id: str) -> str | None:
        return self.store.model_name(response_id)

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
            "config": asdict(experiment.config),
            **await asyncio.to_thread(_numbers, experiment),
        }

    def collect(self) -> Iterator[Metric]:
        yield from super().collect()
        experiment = self.experiment
        if experiment is None:
            return
        counts = {
            (arm, field): count
            for arm, variant in dict(experiment.arms).items()
            for field, count in asdict(variant).items()
        }
        counts |= {(arm, "slower"): getattr(experiment.paces.counts, arm) for arm in ("old", "new")}
        text = "Counts of the canary's experiment, by model and kind"
        yield metric_family(GaugeMetricFamily, "canary", text, ["arm", "kind"], counts)
        share = 0.0 if experiment.canary is None else experiment.config.share
        yield GaugeMetricFamily(
            "fastlm_canary_share", "Share of conversations of the canary", share
        )
        tests = {
            (name, field): value
            for name, test in experiment.tests.items()
            for field, value in test._asdict().items()
        }
        text = "Canary minus old model, with its always-valid interval"
        yield metric_family(
            GaugeMetricFamily, "canary_difference", text, ["test", "statistic"], tests
        )


def _numbers(experiment: CanaryExperiment) -> dict[str, Any]:
    arms, pairs = dict(experiment.arms), experiment.paces.counts
    tests = comparisons(arms, pairs, experiment.config)
    return {
        "experiment": experiment.id,
        "arms": {name: asdict(variant) for name, variant in arms.items()},
        "slower": asdict(pairs),
        "tests": {name: test._asdict() for name, test in tests.items()},
    }
