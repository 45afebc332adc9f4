"""Counters of the models that a server changes between, and of its canary."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from fastlm.serve.models import Models
    from fastlm.serve.switch import Switch


class ModelMetrics(Collector):
    """For `fastlm.serve.metrics.Metrics.add`."""

    def __init__(self, models: "Models", switch: "Switch"):
        self.models, self.switch = models, switch

    def collect(self) -> Iterator[Metric]:
        models, trial = self.models, self.switch.trial
        info = GaugeMetricFamily("fastlm_model", "Models in memory", labels=["model", "role"])
        roles = [(models.current, "current"), *((served, "leaving") for served in models.leaving)]
        if models.trial is not None:
            roles.append((models.trial.served, "canary"))
        for served, role in roles:
            info.add_metric([served.name, role], 1)
        yield info
        answers = CounterMetricFamily(
            "fastlm_model_answers", "Answers of each model", labels=["model", "ended"]
        )
        for (name, ended), count in list(models.answers.items()):
            answers.add_metric([name, ended], count)
        yield answers
        decisions = CounterMetricFamily(
            "fastlm_model_decisions", "Promotions, rollbacks and trials without a decision",
            labels=["action"],
        )  # fmt: skip
        for action, count in list(self.switch.made.items()):
            decisions.add_metric([action], count)
        yield decisions
        if trial is None:
            return
        counts = GaugeMetricFamily(
            "fastlm_canary", "What the canary's trial has counted", labels=["arm", "what"]
        )
        for arm, counted in dict(trial.arms).items():
            for what, count in asdict(counted).items():
                counts.add_metric([arm, what], count)
        for arm in trial.arms:
            counts.add_metric([arm, "slower"], getattr(trial.paces.counts, arm))
        yield counts
        share = trial.plan.share if models.trial is trial else 0.0
        yield GaugeMetricFamily("fastlm_canary_share", "Of conversations, of the canary", share)
        difference = GaugeMetricFamily(
            "fastlm_canary_difference", "Canary less old model, with its always-valid interval",
            labels=["test", "what"],
        )  # fmt: skip
        for name, test in trial.tests.items():
            for what, value in asdict(test).items():
                difference.add_metric([name, what], value)
        yield difference
