"""The monitor of a server: it measures answers, watches alerts, and has the dashboard's data."""

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
from fastlm.serve.metrics import labelled
from fastlm.serve.middleware import log
from fastlm.serve.monitor import window
from fastlm.serve.monitor.judges import JUDGES, Judge
from fastlm.serve.monitor.prompts_drift import Reference, drift
from fastlm.serve.monitor.recorder import Keep, Recorder, RequestTrace
from fastlm.serve.monitor.rules import CHECK_SECONDS, Alerts, Rule, Rules, read_rules, seconds
from fastlm.serve.monitor.summary import LENGTHS, lengths, series, summary, value_of
from fastlm.serve.monitor.window import Period, read_period
from fastlm.serve.options import ServeOptions
from fastlm.serve.protocol.completion import GenerationRequest
from fastlm.serve.ratings import Rating, read_ratings

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

# seconds, and parts over time; 0: since the first answer
WINDOWS = {"hour": (3600.0, 60), "day": (86400.0, 48), "week": (7 * 86400.0, 56), "all": (0.0, 60)}
WIDE = 4  # parts that rates are taken of together: their intervals need more answers
CACHE_SECONDS = 5.0  # several who look at the dashboard read the database once
MOST_MODELS = 6  # side by side: the latest
PARAMETERS = ("window", "begin", "end")


@dataclass(frozen=True)
class Settings:
    """What a server monitors. ``ratings``: the numbers that people may give. ``judges``: one of
    each kind, whose rates are shown.
    """

    ratings: Sequence[Rating] = ()
    rules: Rules = field(default_factory=Rules)
    keep: Keep = field(default_factory=Keep)
    judges: Sequence[Judge] = JUDGES

    @staticmethod
    def of(options: ServeOptions) -> "Settings":
        """Read the options of the server. InputError: names the line of a file that is wrong."""
        ratings = [] if options.metrics is None else read_ratings(options.metrics)
        rules = Rules() if options.alerts is None else read_rules(options.alerts, ratings)
        return Settings(ratings, rules, Keep(options.measure_days, options.measure_rows))


class Monitor:
    """InputError: as `FeedbackStore.declare`."""

    def __init__(self, store: "FeedbackStore", settings: Settings) -> None:
        self.store, self.settings = store, settings
        store.declare(settings.ratings)
        self.recorder = Recorder(
            store, settings.judges, settings.keep, settings.rules.reference.rows, self._often
        )
        self.alerts = Alerts(
            settings.rules.alerts, self._values, lambda state: log("alert", **state.row())
        )
        self._checked = time.monotonic()
        self._lock, self._one = threading.Lock(), CapacityLimiter(1)
        self._cached: dict[Any, tuple[float, dict[str, Any]]] = {}

    @property
    def ratings(self) -> Sequence[Rating]:
        return self.settings.ratings

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
        text = "1 while a rule for alerts fires"
        yield labelled(GaugeMetricFamily, "alert", text, ["name"], alerts)
        counts = self.recorder.counts
        outcomes = {("written",): counts.written, ("dropped",): counts.dropped}
        text = "Measures of answers: written to the database, dropped because too many waited"
        yield labelled(CounterMetricFamily, "measures", text, ["outcome"], outcomes)
        text = "Times that the database could not be used by the monitor"
        yield CounterMetricFamily("fastlm_measure_errors", text, counts.database_errors)

    # ---- alerts

    def _often(self) -> None:
        if not self.alerts.states or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        self.alerts.check(time.time())

    def _values(self, now: float) -> Callable[[Rule], dict[str, Any]]:
        """Values of rules' metrics; for rules with one window, the database is read once."""

        @cache
        def period(length: float) -> Period:
            return read_period(self.store, now - length, now + 1, length / 60)

        @cache
        def told(length: float, model: str | None) -> dict[str, Any]:
            return self._summary(period(length).of_model(model))

        @cache
        def moved(length: float) -> dict[str, Any]:
            return drift(self.store, self.settings.rules.reference, now - length, now + 1)

        def value(rule: Rule) -> dict[str, Any]:
            length = seconds(rule.window)
            if rule.metric.startswith("drift"):
                return value_of(rule.metric, {}, moved(length))
            return value_of(rule.metric, told(length, rule.model), {})

        return value

    # ---- the dashboard

    async def dashboard(self, query: Mapping[str, str]) -> dict[str, Any]:
        name, reference = read_query(query)
        try:
            return await run_sync(self.data, name, reference, limiter=self._one)
        except InputError:
            raise ApiError(
                "dashboard: the database cannot be used; try again", status=503,
                kind="server_error", code="no_database", headers={"retry-after": "5"},
            ) from None  # fmt: skip

    def data(self, name: str, reference: Reference | None = None) -> dict[str, Any]:
        """Return all that the dashboard shows of a window of `WINDOWS`. Takes a while.

        InputError: the database cannot be used.
        """
        reference = reference or self.settings.rules.reference
        with self._lock:
            oldest = time.monotonic() - CACHE_SECONDS
            self._cached = {k: known for k, known in self._cached.items() if known[0] > oldest}
            if (name, reference) not in self._cached:
                told = self._data(name, reference)
                self._cached[name, reference] = time.monotonic(), told
            told = self._cached[name, reference][1]
        counts = self.recorder.counts
        keep = {"keep_days": self.settings.keep.days, "keep_rows": self.settings.keep.rows}
        return told | {"alerts": self.alerts.rows(), "measures": asdict(counts) | keep}

    def _data(self, name: str, reference: Reference) -> dict[str, Any]:
        now = time.time()
        length, count = WINDOWS[name]
        since, until = now - length, now
        if name == "all":
            first, last = window.span(self.store) or (now - 3600, now)
            since, until = first, max(now, last)
        edges = np.linspace(since, until + 1e-3, count + 1)
        period = read_period(self.store, since, until + 1, (until - since) / 60)
        models = window.models(self.store, MOST_MODELS)
        sides = (None, *(models if len(models) > 1 else ()))
        groups = [self._group(model, period.of_model(model), edges) for model in sides]
        return {
            "now": now, "window": name, "since": since, "until": until,
            "edges": edges.tolist(), "rate_edges": edges[::WIDE].tolist(),
            "length_edges": LENGTHS, "models": models, "groups": groups,
            "unmatched": len({(row.rater, row.key) for row in period.feedback if not row.model}),
            "cut": period.cut,
            "drift": drift(self.store, reference, since, until + 1),
        }  # fmt: skip

    def _group(self, model: str | None, period: Period, edges: np.ndarray) -> dict[str, Any]:
        return {
            "model": model,
            "summary": self._summary(period),
            "series": series(period, self.settings.judges, edges, edges[::WIDE]),
            "lengths": lengths(period.answers),
        }

    def _summary(self, period: Period) -> dict[str, Any]:
        return summary(period, self.settings.ratings, self.settings.judges)


def read_query(query: Mapping[str, str]) -> tuple[str, Reference | None]:
    """Read the window (hour, day, week or all), and another reference for drift where the query
    names one. ApiError: names what is wrong."""
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
        return name, Reference(begin=query.get("begin", ""), end=query.get("end", ""))
    except InputError as error:
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None
