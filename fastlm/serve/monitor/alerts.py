"""Alerts: which rules fire. A rule changes its state only after several checks (`Rule.hold`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlm.serve.monitor.rules import Rule

CHECK_SECONDS = 30.0


@dataclass
class AlertState:
    """The state of a rule. ``since``: when it last began or ceased to fire. ``found``: what the
    last check found.
    """

    rule: Rule
    firing: bool = False
    since: float | None = None
    found: Mapping[str, Any] | None = None
    streak: int = 0  # checks in a row that speak for the other state

    def row(self) -> dict[str, Any]:
        """Return it for the dashboard and the log."""
        names = ("name", "metric", "model", "window", "above", "below")
        rule = {name: getattr(self.rule, name) for name in names}
        value = self.found or dict.fromkeys(("value", "low", "high", "n"))
        return {**rule, "firing": self.firing, "since": self.since, **value}


@dataclass
class Alerts:
    """``values``: the metric of a rule now (`fastlm.serve.monitor.summary.value_of`). ``changed``:
    told of a state that changed.
    """

    rules: tuple[Rule, ...]
    values: Callable[[Rule, float], Mapping[str, Any]]
    changed: Callable[[AlertState], None]
    states: list[AlertState] = field(init=False)

    def __post_init__(self) -> None:
        self.states = [AlertState(rule) for rule in self.rules]

    def check(self, now: float) -> None:
        """Look at every rule. InputError: the database cannot be used; what it had not come to
        stays as it is.
        """
        for state in self.states:
            state.found = found = self.values(state.rule, now)
            other = state.rule.within(found) if state.firing else state.rule.beyond(found)
            state.streak = state.streak + 1 if other else 0
            if state.streak >= state.rule.hold:
                state.firing, state.streak, state.since = not state.firing, 0, now
                self.changed(state)

    def told(self) -> list[dict[str, Any]]:
        """For the dashboard, those that fire first."""
        return [state.row() for state in sorted(self.states, key=lambda state: not state.firing)]
