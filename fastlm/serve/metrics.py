"""Prometheus metrics of the server. docs/serving-operation.md lists the names;
fastlm/serve/grafana.json is a dashboard for them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from fastlm.inference.requests import EngineStats

# Bucket bounds: times of a request in seconds
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Bucket bounds: seconds between two tokens
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
TOKENS = (8, 32, 128, 512, 2048, 8192, 32768, 131072)
GAUGES = {
    "running": "Requests whose answers are being computed",
    "waiting": "Requests in the queue",
    "num_blocks": "Blocks of the KV cache",
    "block_bytes": "Bytes of a block. Its memory is allocated at its first use and kept",
    "used_blocks": "Blocks that running requests hold",
    "cached_blocks": "Blocks kept of requests that ended; they are evicted when blocks run short",
}
COUNTERS = {
    "steps": "Steps of the engine",
    "prompt_tokens": "Computed prompt tokens",
    "cached_tokens": "Prompt tokens from the prefix cache",
    "new_tokens": "Tokens of answers",
    "drafted_tokens": "Draft tokens that were proposed and computed",
    "accepted_tokens": "Draft tokens that were accepted",
    "draft_failures": "Answers that run without draft tokens because the draft model failed",
    "preemptions": "Requests returned to the queue because blocks ran short",
}


class RequestMetrics:
    """The metrics of the requests to one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self.counter("requests", "Requests by path and status", "path", "status")
        self.errors = self.counter("errors", "Requests refused or failed, by type", "type")
        text = "Time of a request"
        self.request_seconds = self.histogram("request_seconds", text, SECONDS, "path")

    def counter(self, name: str, text: str, *labels: str) -> Any:
        return Counter(f"fastlm_{name}", text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Any:
        return Histogram(f"fastlm_{name}", text, labels, registry=self.registry, buckets=buckets)

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Register another source of metrics."""
        self.registry.register(_Source(collect))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Metrics(RequestMetrics):
    """The metrics of a server of models. ``stats`` is called at each scrape."""

    def __init__(self, stats: Callable[[], "EngineStats"]):
        super().__init__()
        text = "Answers that ended because their client disconnected or was too slow"
        self.cancelled = self.counter("cancellations", text)
        self.feedback = self.counter("feedback", "Stored feedback, by kind", "kind")
        text = "Conversations that could not be stored (their answers were delivered)"
        self.store_failures = self.counter("store_failures", text)
        text = "Time from submission to the first step, observed at the end of an answer"
        self.queue_seconds = self.histogram("queue_seconds", text, SECONDS)
        text = "Time from submission to the first token"
        self.first_token = self.histogram("time_to_first_token_seconds", text, SECONDS)
        text = "Time between two tokens of an answer"
        self.next_token = self.histogram("inter_token_seconds", text, TOKEN_SECONDS)
        self.prompt_length = self.histogram("prompt_length_tokens", "Tokens of a prompt", TOKENS)
        self.add(lambda: _engine_metrics(stats()))


class _Source(Collector):
    """Adapts a function to the interface of a registry."""

    def __init__(self, function: Callable[[], Iterable[Metric]]):
        self.function = function

    def collect(self) -> Iterable[Metric]:
        return self.function()


def _engine_metrics(stats: "EngineStats") -> Iterator[Metric]:
    for name, text in GAUGES.items():
        yield GaugeMetricFamily(f"fastlm_{name}", text, getattr(stats, name))
    for name, text in COUNTERS.items():
        yield CounterMetricFamily(f"fastlm_{name}", text, getattr(stats, name))
    finished = {(reason,): count for reason, count in stats.finished.items()}
    text = "Answers by finish reason"
    yield metric_family(CounterMetricFamily, "answers", text, ["reason"], finished)


def metric_family(
    kind: Any, name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]
) -> Metric:
    """Return a metric with a value for each tuple of labels."""
    family = kind(f"fastlm_{name}", text, labels=labels)
    for key, value in list(values.items()):
        family.add_metric(key, value)
    return family
