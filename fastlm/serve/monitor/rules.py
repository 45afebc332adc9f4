"""Alerts: rules, and which of them fire. The rules are in a small TOML file:

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
from fastlm.serve.monitor.prompts_drift import Reference
from fastlm.serve.monitor.summary import RATES, VALUES
from fastlm.serve.ratings import Rating
from fastlm.serve.toml_file import read_tables

MOST = 64  # rules
UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
CHECK_SECONDS = 30.0
Number = Annotated[int, Field(ge=1, le=10_000)]


@dataclass(frozen=True)
class Rule:
    """Fires where ``metric`` was ``above`` or ``below`` a bound in ``hold`` checks in a row, each
    over the last ``window``.

    A rate or a mean of people's numbers is beyond the bound if the whole of its 95 % interval is.
    Another value is if at least ``least`` answers are behind it. The alert ends where ``hold``
    checks in a row find the value itself within ``clear`` (default: the bound; of a value without
    an interval, a tenth of the bound further), or nothing at all.
    """

    name: Annotated[Name, Field(max_length=128)]
    metric: str
    window: str
    above: float | None = None
    below: float | None = None
    clear: float | None = None
    hold: Number = 2
    least: Number = 20
    model: str | None = None

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            got = "neither" if self.above is None else "both"
            raise InputError(f"above: expected this or below, got {got}")
        if self.clear is not None and self._past(self.clear, self.bound):
            side = "most" if self.above is not None else "least"
            raise InputError(
                f"clear: expected at {side} {self.bound:g}, the bound, got {self.clear:g}"
            )
        seconds(self.window)

    @property
    def bound(self) -> float:
        bound = self.below if self.above is None else self.above
        assert bound is not None
        return bound

    def _past(self, value: float, bound: float) -> bool:
        return value < bound if self.above is None else value > bound

    def beyond(self, found: Mapping[str, Any]) -> bool:
        """Whether a value is surely beyond the bound (`value_of`)."""
        edge = found["high" if self.above is None else "low"]
        if edge is None and found["n"] >= self.least:
            edge = found["value"]
        if found["value"] is None or edge is None:
            return False
        return self._past(edge, self.bound)

    def within(self, found: Mapping[str, Any]) -> bool:
        """Whether a value is well within the bound again."""
        clear = self.bound if self.clear is None else self.clear
        if self.clear is None and found["low"] is None:
            clear += 0.1 * abs(clear) * (1 if self.above is None else -1)
        return found["value"] is None or not self._past(found["value"], clear)


@dataclass(frozen=True)
class Rules:
    alerts: tuple[Rule, ...] = ()
    reference: Reference = field(default_factory=Reference)


def seconds(window: str) -> float:
    """The seconds of "15m", "1h" or "7d". InputError: anything else, or over 90 days."""
    found = re.fullmatch(r"(\d{1,5})([mhd])", window)
    length = int(found[1]) * UNITS[found[2]] if found else 0.0
    if not 60 <= length <= 90 * 86400:
        raise InputError(
            f"window: expected minutes, hours or days: 15m, 1h, 7d; got {window!r:.40}"
        )
    return length


def read_rules(path: str | Path, ratings: Sequence[Rating]) -> Rules:
    """The rules of a file. ``ratings``: the numbers whose names they may use.

    InputError: names the file's line.
    """
    tables = read_tables(path, {"alert": (Rule, MOST), "reference": (Reference, 1)})
    known = (*RATES, *VALUES, *(rating.name for rating in ratings))
    for table in tables["alert"]:
        rule = table.value
        if rule.metric not in known:
            raise table.error(
                "metric", f"expected one of {', '.join(known)}; got {rule.metric!r:.80}"
            )
        if rule.metric.startswith("drift") and rule.model is not None:
            raise table.error(
                "model", f"expected none, since drift is of all prompts, got {rule.model!r:.80}"
            )
    reference = [table.value for table in tables["reference"]] or [Reference()]
    return Rules(tuple(table.value for table in tables["alert"]), reference[0])


@dataclass
class AlertState:
    """The state of a rule. ``since``: when it last began or ceased to fire. ``found``: what the
    last check found. ``streak``: checks in a row that speak for the other state.
    """

    rule: Rule
    firing: bool = False
    since: float | None = None
    found: Mapping[str, Any] | None = None
    streak: int = 0

    def row(self) -> dict[str, Any]:
        """Return it for the dashboard and the log."""
        names = ("name", "metric", "model", "window", "above", "below")
        rule = {name: getattr(self.rule, name) for name in names}
        value = self.found or dict.fromkeys(("value", "low", "high", "n"))
        return {**rule, "firing": self.firing, "since": self.since, **value}


class Alerts:
    """``values``: at a time, what is found of a rule's metric
    (`fastlm.serve.monitor.summary.value_of`). ``changed``: told of a state that changed.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        values: Callable[[float], Callable[[Rule], Mapping[str, Any]]],
        changed: Callable[[AlertState], None],
    ):
        self.values, self.changed = values, changed
        self.states = [AlertState(rule) for rule in rules]

    def check(self, now: float) -> None:
        """Look at every rule. InputError: the database cannot be used; what it had not come to
        stays as it is.
        """
        value = self.values(now)
        for state in self.states:
            state.found = found = value(state.rule)
            other = state.rule.within(found) if state.firing else state.rule.beyond(found)
            state.streak = state.streak + 1 if other else 0
            if state.streak >= state.rule.hold:
                state.firing, state.streak, state.since = not state.firing, 0, now
                self.changed(state)

    def rows(self) -> list[dict[str, Any]]:
        """For the dashboard, those that fire first."""
        return [state.row() for state in sorted(self.states, key=lambda state: not state.firing)]
