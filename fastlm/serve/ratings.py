"""Read the numbers that users may give to answers and conversations, declared in a TOML file:

```toml
[[metric]]
name = "stars"
kind = "number"           # or "boolean"
low = 1
high = 5
better = "higher"         # or "lower"
level = "response"        # or "conversation"
```
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fastlm.errors import InputError
from fastlm.serve.toml_table import read_tables

NAME_PATTERN = "[a-z][a-z0-9_]{0,62}"
MAX_METRICS = 32
BUILT_IN = (
    "thumb",
    "pick",
    "stop",
)  # metrics of `fastlm serve --canary-metric` without a declaration


@dataclass(frozen=True)
class Rating:
    """The declaration of a number. kind: "number" from ``low`` to ``high``, or "boolean". better:
    "higher" or "lower". level: what the number is about, a "response" or a "conversation".
    """

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    kind: Literal["boolean", "number"]
    better: Literal["higher", "lower"]
    level: Literal["response", "conversation"] = "response"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.kind == "boolean" and (self.low, self.high) != (0, 1):
            raise InputError("low: expected none for a boolean (its numbers are 0 and 1), got one")
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise InputError(f"high: expected more than low, {self.low:g}, got {self.high:g}")

    def row(self) -> dict[str, Any]:
        """Return the row of the database."""
        return asdict(self)

    def thumb(self, value: float) -> str | None:
        """Return the thumb of a number: "up" in the better half of its range, "down" in the other;
        None in the middle."""
        middle = (self.low + self.high) / 2
        if value == middle:
            return None
        return "up" if (value > middle) == (self.better == "higher") else "down"

    def parse(self, value: Any, field: str) -> float:
        """Return a value as a number. InputError: not of the metric's kind, or out of its range."""
        if self.kind == "boolean":
            if not isinstance(value, bool):
                raise InputError(f"{field}: expected true or false, got {value!r:.80}")
            return float(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise InputError(
                f"{field}: expected a number from {self.low:g} to {self.high:g}, got {value!r:.80}"
            )
        return float(value)


def read_ratings(path: str | Path) -> list[Rating]:
    """Read the [[metric]] tables of a TOML file. InputError: names the file's line."""
    tables = read_tables(path, {"metric": (Rating, MAX_METRICS)})["metric"]
    for table in tables:
        if table.value.name in BUILT_IN:
            raise table.error(
                "name",
                f"expected another than {', '.join(BUILT_IN)}, which are metrics already"
                f" (--canary-metric), got {table.value.name!r}",
            )
    return [table.value for table in tables]


def read_values(
    values: Mapping[str, Any], declared: Sequence[Rating], *, response: bool, conversation: bool
) -> tuple[tuple[str, float], ...]:
    """Check the values of feedback. ``response``, ``conversation``: what it is about.
    InputError: a name that is not declared, a wrong value, a metric without its id.
    """
    ratings = {rating.name: rating for rating in declared}
    checked = []
    for name, value in values.items():
        field = f"metrics.{name:.64}"
        if name not in ratings:
            names = ", ".join(ratings) or "none: the server declares none"
            raise InputError(f"{field}: expected one of {names}")
        rating = ratings[name]
        if not (response if rating.level == "response" else conversation):
            raise InputError(f"{field}: expected {rating.level}_id: it is about a {rating.level}")
        checked.append((name, rating.parse(value, field)))
    return tuple(checked)
