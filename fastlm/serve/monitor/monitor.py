"""Monitor a server: measure its answers, check its alerts, and compute the dashboard's data."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastlm.errors import InputError
from fastlm.serve.api_error import ApiError
from fastlm.serve.metrics import metric_family
from fastlm.serve.middleware import log
from fastlm.serve.monitor import window
from fastlm.serve.monitor.alerts import (
    CHECK_SECONDS,
    AlertConfig,
    AlertManager,
    AlertRule,
    read_alert_config,
    window_seconds,
)
from fastlm.serve.monitor.answer_judges import JUDGES, Judge
from fastlm.serve.monitor.prompt_drift import DriftReference, drift
from fastlm.serve.monitor.recorder import Recorder, RequestTrace, Retention
from fastlm.serve.monitor.summary import LENGTH_EDGES, lengths, series, summary, value_of
from fastlm.serve.monitor.window import Period, read_period
from fastlm.serve.options import ServeOptions
from fastlm.serve.protocol.completion import GenerationRequest
from fastlm.serve.ratings import Rating, read_ratings

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

# name -> (seconds, intervals of the charts); 0: since the first answer
WINDOWS = {"hour": (3600.0, 60), "day": (86400.0, 48), "week": (7 * 86400.0, 56), "all": (0.0, 60)}
RATE_INTERVALS = 4  # merged for rates, since confidence intervals need more answers
CACHE_SECONDS = 5.0  # several viewers of the dashboard cause one read of the database
MAX_MODELS = 6  # side by side: the latest ones
PARAMETERS = ("window", "begin", "end")


@dataclass(frozen=True)
class MonitorConfig:
    """What a server monitors. ``ratings``: the numbers that people may give. ``judges``: one of
    each kind; the dashboard has their rates.
    """

    ratings: Sequence[Rating] = ()
    alert_config: AlertConfig = field(default_factory=AlertConfig)
    retention: Retention = field(default_factory=Retention)
    judges: Sequence[Judge] = JUDGES

    @staticmethod
    def from_options(options: ServeOptions) -> "MonitorConfig":
        """Read the options of the server. InputError: names the line of a file that is wrong."""
        ratings = [] if options.metrics is None else read_ratings(options.metrics)
        alert_config = AlertConfig()
        if options.alerts is not None:
            alert_config = read_alert_config(options.alerts, ratings)
        return MonitorConfig(
            ratings, alert_config, Retention(options.measure_days, options.measure_rows)
        )


class Monitor:
    """The monitor of a server. InputError: as `FeedbackStore.declare_ratings`."""

    def __init__(self, store: "FeedbackStore", config: MonitorConfig) -> None:
        self.store, self.config = store, config
        store.declare_ratings(config.ratings)
        self.recorder = Recorder(
            store,
            config.judges,
            config.retention,
            config.alert_config.reference.rows,
            self._on_tick,
        )
        self.alerts = AlertManager(
            config.alert_config.alerts, self._values, lambda state: log("alert", **state.row())
        )
        self._checked = time.monotonic()
        self._lock, self._limiter = threading.Lock(), CapacityLimiter(1)
        self._cached: dict[Any, tuple[float, dict[str, Any]]] = {}

    @property
    def ratings(self) -> Sequence[Rating]:
        return self.config.ratings

    def start(self) -> None:
        self.recorder.start()

    def close(self) -> None:
        self.recorder.close()

    def observe(
        self, request: GenerationRequest, model: str, id: str, lengths: Sequence[int]
    ) -> RequestTrace:
        return RequestTrace(self.recorder, request, model, id, lengths)

    def collect(self) -> Iterator[Metric]:
        alerts = {(state.rule.name,): float(state.firing) for state in self.alerts.states}
        text = "1 while the alert fires"
        yield metric_family(GaugeMetricFamily, "alert", text, ["name"], alerts)
        counts = self.recorder.counts
        outcomes = {("written",): counts.written, ("dropped",): counts.dropped}
        text = (
            "Measurements of answers: written to the database, dropped because the queue was full"
        )
        yield metric_family(CounterMetricFamily, "measurements", text, ["outcome"], outcomes)
        text = "Times that the monitor could not use the database"
        yield CounterMetricFamily("fastlm_measurement_errors", text, counts.database_errors)

    # ---- alerts

    def _on_tick(self) -> None:
        if not self.alerts.states or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        self.alerts.check(time.time())

    def _values(self, now: float) -> Callable[[AlertRule], dict[str, Any]]:
        """Return a function from a rule to the value of its metric. For rules with the same window,
        the database is read once."""

        @cache
        def period(length: float) -> Period:
            return read_period(self.store, now - length, now + 1, length / 60)

        @cache
        def period_summary(length: float, model: str | None) -> dict[str, Any]:
            return self._summary(period(length).for_model(model))

        @cache
        def prompt_drift(length: float) -> dict[str, Any]:
            return drift(self.store, self.config.alert_config.reference, now - length, now + 1)

        def value(rule: AlertRule) -> dict[str, Any]:
            length = window_seconds(rule.window)
            if rule.metric.startswith("drift"):
                return value_of(rule.metric, {}, prompt_drift(length))
            return value_of(rule.metric, period_summary(length, rule.model), {})

        return value

    # ---- the dashboard

    async def dashboard(self, query: Mapping[str, str]) -> dict[str, Any]:
        name, reference = read_query(query)
        try:
            return await run_sync(self.data, name, reference, limiter=self._limiter)
        except InputError:
            raise ApiError(
                "dashboard: the database cannot be used; try again", status=503,
                kind="server_error", code="no_database", headers={"retry-after": "5"},
            ) from None  # fmt: skip

    def data(self, name: str, reference: DriftReference | None = None) -> dict[str, Any]:
        """Return the data of the dashboard for a window of `WINDOWS`. This can be slow.

        InputError: the database cannot be used.
        """
        reference = reference or self.config.alert_config.reference
        with self._lock:
            oldest = time.monotonic() - CACHE_SECONDS
            self._cached = {k: entry for k, entry in self._cached.items() if entry[0] > oldest}
            if (name, reference) not in self._cached:
                data = self._data(name, reference)
                self._cached[name, reference] = time.monotonic(), data
            data = self._cached[name, reference][1]
        counts = self.recorder.counts
        retention = self.config.retention
        limits = {"retention_days": retention.days, "retention_rows": retention.rows}
        return data | {"alerts": self.alerts.rows(), "measurements": asdict(counts) | limits}

    def _data(self, name: str, reference: DriftReference) -> dict[str, Any]:
        now = time.time()
        length, count = WINDOWS[name]
        since, until = now - length, now
        if name == "all":
            first, last = window.measured_span(self.store) or (now - 3600, now)
            since, until = first, max(now, last)
        edges = np.linspace(since, until + 1e-3, count + 1)
        period = read_period(self.store, since, until + 1, (until - since) / 60)
        models = window.latest_models(self.store, MAX_MODELS)
        columns = (None, *(models if len(models) > 1 else ()))
        groups = [self._group(model, period.for_model(model), edges) for model in columns]
        return {
            "now": now, "window": name, "since": since, "until": until,
            "edges": edges.tolist(), "rate_edges": edges[::RATE_INTERVALS].tolist(),
            "length_edges": LENGTH_EDGES, "models": models, "groups": groups,
            "unmatched": len({(row.rater, row.key) for row in period.feedback if not row.model}),
            "truncated": period.truncated,
            "drift": drift(self.store, reference, since, until + 1),
        }  # fmt: skip

    def _group(self, model: str | None, period: Period, edges: np.ndarray) -> dict[str, Any]:
        return {
            "model": model,
            "summary": self._summary(period),
            "series": series(period, self.config.judges, edges, edges[::RATE_INTERVALS]),
            "lengths": lengths(period.answers),
        }

    def _summary(self, period: Period) -> dict[str, Any]:
        return summary(period, self.config.ratings, self.config.judges)


def read_query(query: Mapping[str, str]) -> tuple[str, DriftReference | None]:
    """Read the window (hour, day, week or all), and another reference for drift if the query
    has one. ApiError: a wrong parameter."""
    for key in query:
        if key not in PARAMETERS:
            raise ApiError(f"{key:.80}: expected one of {', '.join(PARAMETERS)}", param=key[:80])
    name = query.get("window", "day")
    if name not in WINDOWS:
        raise ApiError(
            f"window: expected one of {', '.join(WINDOWS)}, got {name!r:.80}", param="window"
        )
    if not query.get("begin") and not query.get("end"):
        return name, None
    try:
        return name, DriftReference(begin=query.get("begin", ""), end=query.get("end", ""))
    except InputError as error:
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None
