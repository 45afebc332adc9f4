"""Rules for alerts, from a small TOML file:

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.serve.monitor.prompts_drift import Reference
from fastlm.serve.monitor.summary import RATES, VALUES
from fastlm.serve.ratings import Rating
from fastlm.serve.toml_file import read_tables

MOST = 64  # rules
UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Rule:
    """Fires where ``metric`` was ``above`` or ``below`` a bound in ``hold`` checks in a row, each
    over the last ``window``.

    A rate or a mean of people's numbers is beyond the bound if the whole of its 95 % interval is.
    Another value is if at least ``least`` answers are behind it. The alert ends where ``hold``
    checks in a row find the value itself within ``clear`` (default: the bound; of a value without
    an interval, a tenth of the bound further), or nothing at all.
    """

    name: str
    metric: str
    window: str
    above: float | None = None
    below: float | None = None
    clear: float | None = None
    hold: int = 2
    least: int = 20
    model: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 128 or not self.name.isprintable():
            raise InputError(f"name: wanted 1 to 128 characters, got {self.name!r:.80}")
        if (self.above is None) == (self.below is None):
            got = "neither" if self.above is None else "both"
            raise InputError(f"above: wanted this or below, got {got}")
        if self.clear is not None:
            right = self.clear <= self.bound if self.above is not None else self.clear >= self.bound
            if not right:
                raise InputError(
                    f"clear: wanted at {'most' if self.above is not None else 'least'}"
                    f" {self.bound:g}, the bound, got {self.clear:g}"
                )
        for key in ("hold", "least"):
            if not 1 <= getattr(self, key) <= 10_000:
                raise InputError(f"{key}: wanted 1 to 10,000, got {getattr(self, key)}")
        seconds(self.window)

    @property
    def bound(self) -> float:
        found = self.above if self.above is not None else self.below
        assert found is not None
        return found

    def beyond(self, found: Mapping[str, Any]) -> bool:
        """Whether a value is surely beyond the bound (`value_of`)."""
        if found["value"] is None:
            return False
        if found["low"] is None and found["n"] < self.least:
            return False
        if self.above is not None:
            edge = found["value"] if found["low"] is None else found["low"]
            return edge > self.bound
        return (found["value"] if found["high"] is None else found["high"]) < self.bound

    def within(self, found: Mapping[str, Any]) -> bool:
        """Whether a value is well within the bound again."""
        if found["value"] is None:
            return True
        clear = self.clear
        if clear is None:
            margin = 0.1 * abs(self.bound) if found["low"] is None else 0.0
            clear = self.bound - margin if self.above is not None else self.bound + margin
        return found["value"] <= clear if self.above is not None else found["value"] >= clear


@dataclass(frozen=True)
class Rules:
    alerts: tuple[Rule, ...] = ()
    reference: Reference = field(default_factory=Reference)


def seconds(window: str) -> float:
    """The seconds of "15m", "1h" or "7d". InputError: anything else, or over 90 days."""
    found = re.fullmatch(r"(\d{1,5})([mhd])", window)
    length = int(found[1]) * UNITS[found[2]] if found else 0.0
    if not 60 <= length <= 90 * 86400:
        raise InputError(f"window: wanted minutes, hours or days: 15m, 1h, 7d; got {window!r:.40}")
    return length


def read_rules(path: str | Path, ratings: Sequence[Rating]) -> Rules:
    """The rules of a file. ``ratings``: the numbers whose names they may use.

    InputError: names the file's line.
    """
    found = read_tables(path, {"alert": Rule, "reference": Reference})
    known = (*RATES, *VALUES, *(rating.name for rating in ratings))
    seen: set[str] = set()
    for table in found["alert"]:
        rule = table.value
        for key, wrong, text in (
            ("metric", rule.metric not in known, f"wanted one of {', '.join(known)};"),
            (
                "model", rule.metric.startswith("drift") and rule.model is not None,
                "wanted none, since drift is of all prompts,",
            ),
            ("name", rule.name in seen, "wanted each once,"),
        ):  # fmt: skip
            if wrong:
                raise InputError(
                    f"{path} line {table.line(key)}: {key}: {text} got {getattr(rule, key)!r:.80}"
                )
        seen.add(rule.name)
    for kind, most in (("alert", MOST), ("reference", 1)):
        if len(found[kind]) > most:
            line = found[kind][most].line("")
            raise InputError(f"{path} line {line}: {kind}: wanted at most {most}")
    reference = found["reference"][0].value if found["reference"] else Reference()
    return Rules(tuple(table.value for table in found["alert"]), reference)
