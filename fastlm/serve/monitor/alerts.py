"""Read the rules of alerts from a TOML file, and find out which of them fire:

```toml
[[alert]]
name = "refuses too often"
metric = "refusal"
above = 0.2
window = "1h"

[[alert]]
name = "slow"
metric = "first_token_p95"      # seconds
above = 2.0
window = "15m"

[[reference]]                   # for drift; default: the first 500 prompts
begin = "2026-11-01"
end = "2026-11-08"
```
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fastlm.errors import InputError
from fastlm.schema import Name
from fastlm.serve.monitor.prompt_drift import DriftReference
from fastlm.serve.monitor.summary import RATES, VALUES
from fastlm.serve.ratings import Rating
from fastlm.serve.toml_table import read_tables

MAX_RULES = 64
UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
CHECK_SECONDS = 30.0
PositiveInt = Annotated[int, Field(ge=1, le=10_000)]


@dataclass(frozen=True)
class AlertRule:
    """A rule. It fires if ``metric`` was ``above`` or ``below`` a bound in ``consecutive_checks``
    checks, each over the last ``window``.

    A rate or a mean of people's numbers is beyond the bound if its 95 % interval is entirely
    beyond. Another value is beyond if it is and at least ``min_answers`` answers are behind it. The
    alert ends if ``consecutive_checks`` checks find the value itself within ``clear``, or find no
    value. ``clear`` is the bound by default; for a value without an interval it is a tenth of the
    bound further.
    """

    name: Annotated[Name, Field(max_length=128)]
    metric: str
    window: str
    above: float | None = None
    below: float | None = None
    clear: float | None = None
    consecutive_checks: PositiveInt = 2
    min_answers: PositiveInt = 20
    model: str | None = None

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            got = "neither" if self.above is None else "both"
            raise InputError(f"above: expected this or below, got {got}")
        if self.clear is not None and self._is_past(self.clear, self.bound):
            side = "most" if self.above is not None else "least"
            raise InputError(
                f"clear: expected at {side} {self.bound:g}, the bound, got {self.clear:g}"
            )
        window_seconds(self.window)

    @property
    def bound(self) -> float:
        bound = self.below if self.above is None else self.above
        assert bound is not None
        return bound

    def _is_past(self, value: float, bound: float) -> bool:
        return value < bound if self.above is None else value > bound

    def is_beyond(self, estimate: Mapping[str, Any]) -> bool:
        """Return whether a value (`value_of`) is beyond the bound, with its interval."""
        edge = estimate["high" if self.above is None else "low"]
        if edge is None and estimate["n"] >= self.min_answers:
            edge = estimate["value"]
        if estimate["value"] is None or edge is None:
            return False
        return self._is_past(edge, self.bound)

    def is_clear(self, estimate: Mapping[str, Any]) -> bool:
        """Return whether a value is within ``clear`` again."""
        clear = self.bound if self.clear is None else self.clear
        if self.clear is None and estimate["low"] is None:
            clear += 0.1 * abs(clear) * (1 if self.above is None else -1)
        return estimate["value"] is None or not self._is_past(estimate["value"], clear)


@dataclass(frozen=True)
class AlertConfig:
    """The rules of a file, and the reference for drift."""

    alerts: tuple[AlertRule, ...] = ()
    reference: DriftReference = field(default_factory=DriftReference)


def window_seconds(window: str) -> float:
    """Return the seconds of "15m", "1h" or "7d". InputError: anything else, or over 90 days."""
    match = re.fullmatch(r"(\d{1,5})([mhd])", window)
    length = int(match[1]) * UNITS[match[2]] if match else 0.0
    if not 60 <= length <= 90 * 86400:
        raise InputError(
            f"window: expected minutes, hours or days: 15m, 1h, 7d; got {window!r:.40}"
        )
    return length


def read_alert_config(path: str | Path, ratings: Sequence[Rating]) -> AlertConfig:
    """Read the rules of a file. ``ratings``: the numbers that they may name as metrics.

    InputError: names the file's line.
    """
    tables = read_tables(path, {"alert": (AlertRule, MAX_RULES), "reference": (DriftReference, 1)})
    metrics = (*RATES, *VALUES, *(rating.name for rating in ratings))
    for table in tables["alert"]:
        rule = table.value
        if rule.metric not in metrics:
            raise table.error(
                "metric", f"expected one of {', '.join(metrics)}; got {rule.metric!r:.80}"
            )
        if rule.metric.startswith("drift") and rule.model is not None:
            raise table.error(
                "model", f"expected none, since drift is of all prompts, got {rule.model!r:.80}"
            )
    reference = [table.value for table in tables["reference"]] or [DriftReference()]
    return AlertConfig(tuple(table.value for table in tables["alert"]), reference[0])


@dataclass
class AlertState:
    """The state of a rule. ``since``: when it last started or stopped to fire. ``estimate``: the
    value of the last check. ``streak``: consecutive checks that speak for the other state.
    """

    rule: AlertRule
    firing: bool = False
    since: float | None = None
    estimate: Mapping[str, Any] | None = None
    streak: int = 0

    def row(self) -> dict[str, Any]:
        """Return the state for the dashboard and the log."""
        names = ("name", "metric", "model", "window", "above", "below")
        rule = {name: getattr(self.rule, name) for name in names}
        estimate = self.estimate or dict.fromkeys(("value", "low", "high", "n"))
        return {**rule, "firing": self.firing, "since": self.since, **estimate}


class AlertManager:
    """The alerts of a server. ``values`` returns for a time a function from a rule to the value of
    its metric (`fastlm.serve.monitor.summary.value_of`). ``on_change`` is called with every state
    that changed.
    """

    def __init__(
        self,
        rules: Sequence[AlertRule],
        values: Callable[[float], Callable[[AlertRule], Mapping[str, Any]]],
        on_change: Callable[[AlertState], None],
    ):
        self.values, self.on_change = values, on_change
        self.states = [AlertState(rule) for rule in rules]

    def check(self, now: float) -> None:
        """Check every rule. InputError: the database cannot be used; the states of the rules that
        were not checked stay as they are.
        """
        value = self.values(now)
        for state in self.states:
            state.estimate = estimate = value(state.rule)
            rule = state.rule
            is_other = rule.is_clear(estimate) if state.firing else rule.is_beyond(estimate)
            state.streak = state.streak + 1 if is_other else 0
            if state.streak >= rule.consecutive_checks:
                state.firing, state.streak, state.since = not state.firing, 0, now
                self.on_change(state)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the dashboard, firing alerts first."""
        return [state.row() for state in sorted(self.states, key=lambda state: not state.firing)]
