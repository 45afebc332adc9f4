"""The monitor of a server: it measures answers, watches alerts, and has the dashboard's data."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from fastlm.errors import InputError
from fastlm.serve.gate import log
from fastlm.serve.monitor import rules, window
from fastlm.serve.monitor.alerts import CHECK_SECONDS, Alerts, State
from fastlm.serve.monitor.judges import JUDGES, Judge
from fastlm.serve.monitor.prompts_drift import Reference, drift
from fastlm.serve.monitor.recorder import Counts, Keep, Recorder
from fastlm.serve.monitor.rules import Rule, Rules
from fastlm.serve.monitor.seen import Seen
from fastlm.serve.monitor.summary import LENGTHS, lengths, series, summary
from fastlm.serve.monitor.window import Answers, FeedbackRow
from fastlm.serve.protocol.completion import GenerationRequest
from fastlm.serve.ratings import Rating, read_ratings

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore

# seconds, and parts over time; 0: since the first answer
WINDOWS = {"hour": (3600.0, 60), "day": (86400.0, 48), "week": (7 * 86400.0, 56), "all": (0.0, 60)}
WIDE = 4  # parts that rates are taken of together: their intervals need more answers
CACHE_SECONDS = 5.0  # several who look at the dashboard read the database once
MOST_MODELS = 6  # side by side: the latest


@dataclass(frozen=True)
class Settings:
    """What a server monitors. ``ratings``: the numbers that people may give. ``judges``: one of
    each kind, whose rates are shown.
    """

    ratings: Sequence[Rating] = ()
    rules: Rules = field(default_factory=Rules)
    keep: Keep = field(default_factory=Keep)
    judges: Sequence[Judge] = JUDGES


def read_settings(metrics: Path | None, alerts: Path | None, days: float, rows: int) -> Settings:
    """Settings from the files of `fastlm serve`. InputError: names the line that is wrong."""
    ratings = [] if metrics is None else read_ratings(metrics)
    found = Rules() if alerts is None else rules.read_rules(alerts, ratings)
    return Settings(ratings, found, Keep(days, rows))


class Monitor:
    """``registry``: where Prometheus finds its gauges. InputError: as `FeedbackStore.declare`."""

    def __init__(
        self, store: "FeedbackStore", settings: Settings, registry: CollectorRegistry
    ) -> None:
        self.store, self.settings = store, settings
        store.declare(settings.ratings)
        self.recorder = Recorder(
            store, settings.judges, settings.keep, settings.rules.reference.rows, self._often
        )
        self.alerts = Alerts(settings.rules.alerts, self._value, self._changed)
        self._checked = time.monotonic()
        self._read_at: tuple[float, dict[Any, Any]] = (0.0, {})
        self._lock = threading.Lock()
        self._cached: dict[Any, tuple[float, dict[str, Any]]] = {}
        self._gauge = Gauge(
            "fastlm_alert", "1 while a rule for alerts fires", ("name",), registry=registry
        )
        for rule in settings.rules.alerts:
            self._gauge.labels(rule.name).set(0)
        registry.register(_Counts(self.recorder.counts))

    def start(self) -> None:
        self.recorder.start()

    def close(self) -> None:
        self.recorder.close()

    def seen(self, request: GenerationRequest, model: str, id: str, lengths: Sequence[int]) -> Seen:
        """What measures a request; its `end` has to be called once."""
        return Seen(self.recorder, request, model, id, lengths)

    # ---- alerts

    def _often(self) -> None:
        if not self.alerts.rules or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        try:
            self.alerts.check(time.time())
        except InputError:
            self.recorder.counts.database_errors += 1

    def _value(self, rule: Rule, now: float) -> Mapping[str, Any]:
        """The value of a rule's metric; of rules with one window, the database is read once."""
        if self._read_at[0] != now:
            self._read_at = (now, {})
        known, length = self._read_at[1], rules.seconds(rule.window)

        def once(key: Any, read: Any) -> Any:
            if key not in known:
                known[key] = read()
            return known[key]

        since, until = now - length, now + 1
        if rule.metric.startswith("drift"):
            reference = self.settings.rules.reference
            moved = once(("drift", length), lambda: drift(self.store, reference, since, until))
            return rules.value_of(rule.metric, {"metrics": {}}, moved)
        answers, said = once(length, lambda: self._read(since, until))
        told = once(
            (length, rule.model),
            lambda: self._summary(answers, said, rule.model, length / 60),
        )
        return rules.value_of(rule.metric, told, {})

    def _changed(self, state: State) -> None:
        found, rule = state.found or {}, state.rule
        self._gauge.labels(rule.name).set(float(state.firing))
        log(
            "alert", name=rule.name, firing=state.firing, metric=rule.metric, model=rule.model,
            window=rule.window, above=rule.above, below=rule.below,
            **{key: found.get(key) for key in ("value", "low", "high", "n")},
        )  # fmt: skip

    # ---- the dashboard

    def data(self, name: str, reference: Reference | None = None) -> dict[str, Any]:
        """All that the dashboard shows of a window of `WINDOWS`. Takes a while.

        InputError: the database cannot be used.
        """
        reference = reference or self.settings.rules.reference
        with self._lock:
            at, told = self._cached.get((name, reference), (-CACHE_SECONDS, {}))
            if time.monotonic() - at >= CACHE_SECONDS:
                told = self._data(name, reference)
                fresh = {
                    key: value
                    for key, value in self._cached.items()
                    if time.monotonic() - value[0] < CACHE_SECONDS
                }
                self._cached = fresh | {(name, reference): (time.monotonic(), told)}
        counts = self.recorder.counts
        return told | {
            "alerts": self.alerts.told(),
            "measures": {
                "written": counts.written, "dropped": counts.dropped,
                "database_errors": counts.database_errors,
                "judge_errors": counts.judge_errors,
                "keep_days": self.settings.keep.days, "keep_rows": self.settings.keep.rows,
            },
        }  # fmt: skip

    def _data(self, name: str, reference: Reference) -> dict[str, Any]:
        now = time.time()
        length, count = WINDOWS[name]
        since, until = now - length, now
        if name == "all":
            first, last = window.span(self.store) or (now - 3600, now)
            since, until = first, max(now, last)
        edges = np.linspace(since, until + 1e-3, count + 1)
        answers, said = self._read(since, until + 1)
        minutes = (until - since) / 60
        if answers.cut:  # rates are of the time that was read
            minutes = (until - float(answers["at"][0])) / 60
        known = window.models(self.store, MOST_MODELS)
        groups = []
        for model in (None, *(known if len(known) > 1 else ())):
            some, about = _of(answers, said, model)
            judges = self.settings.judges
            groups.append(
                {
                    "model": model,
                    "summary": summary(some, about, self.settings.ratings, judges, minutes),
                    "series": series(some, about, judges, edges, edges[::WIDE]),
                    "lengths": lengths(some),
                }
            )
        return {
            "now": now, "window": name, "since": since, "until": until,
            "edges": edges.tolist(), "rate_edges": edges[::WIDE].tolist(),
            "length_edges": LENGTHS, "models": known, "groups": groups,
            "unmatched": len({(one.rater, one.key) for one in said if not one.model}),
            "cut": answers.cut,
            "drift": drift(self.store, reference, since, until + 1),
        }  # fmt: skip

    def _read(self, since: float, until: float) -> tuple[Answers, list[FeedbackRow]]:
        return (
            window.read_answers(self.store, since, until),
            window.read_opinions(self.store, since, until),
        )

    def _summary(
        self, answers: Answers, said: list[FeedbackRow], model: str | None, minutes: float
    ) -> dict[str, Any]:
        some, about = _of(answers, said, model)
        return summary(some, about, self.settings.ratings, self.settings.judges, minutes)


def _of(
    answers: Answers, said: list[FeedbackRow], model: str | None
) -> tuple[Answers, list[FeedbackRow]]:
    """Those of a model; None: all."""
    if model is None:
        return answers, said
    return answers.where(answers["model"] == model), [one for one in said if one.model == model]


class _Counts(Collector):
    def __init__(self, counts: Counts):
        self.counts = counts

    def collect(self) -> Iterator[Metric]:
        text = "Measures of answers: written to the database, dropped because too many waited"
        found = CounterMetricFamily("fastlm_measures", text, labels=["outcome"])
        found.add_metric(["written"], self.counts.written)
        found.add_metric(["dropped"], self.counts.dropped)
        yield found
        text = "Times that the database could not be used by the monitor"
        yield CounterMetricFamily("fastlm_measure_errors", text, self.counts.database_errors)
