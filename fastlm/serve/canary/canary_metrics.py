"""What Prometheus scrapes of a canary's experiment."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from fastlm.serve.canary.canary import CanaryExperiment


def canary_metrics(experiment: "CanaryExperiment") -> Iterator[Metric]:
    """Return the counts and tests of an experiment, also of one that has ended."""
    counts = GaugeMetricFamily(
        "fastlm_canary", "What the canary's trial has counted", labels=["arm", "what"]
    )
    for arm, counted in dict(experiment.arms).items():
        for what, count in asdict(counted).items():
            counts.add_metric([arm, what], count)
    for arm in experiment.arms:
        counts.add_metric([arm, "slower"], getattr(experiment.paces.counts, arm))
    yield counts
    share = 0.0 if experiment.canary is None else experiment.config.share
    yield GaugeMetricFamily("fastlm_canary_share", "Of conversations, of the canary", share)
    difference = GaugeMetricFamily(
        "fastlm_canary_difference", "Canary less old model, with its always-valid interval",
        labels=["test", "what"],
    )  # fmt: skip
    for name, test in experiment.tests.items():
        for what, value in test._asdict().items():
            difference.add_metric([name, what], value)
    yield difference
