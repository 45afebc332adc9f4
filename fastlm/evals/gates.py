"""Read gates, bounds on scores, from a TOML file. A gate bounds an end of the score's interval.

    [[gate]]
    score = "attacks.harmbench.plain"
    max = 0.2                # the interval's upper end is at most this

    [[gate]]
    score = "bias.stereoset.language_model"
    min = 0.7                # its lower end is at least this

So a gate needs enough items to pass, and more items never make a good model fail.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.schema import Finite, Name, read_toml, validate


class GateEntry(TypedDict):
    score: Name
    max: NotRequired[Finite]
    min: NotRequired[Finite]


class GateFile(TypedDict):
    gate: Annotated[list[GateEntry], MinLen(1)]


@dataclass(frozen=True)
class GateBound:
    """The bounds of one gate on the interval of a score."""

    score: str
    max_value: float = math.inf
    min_value: float = -math.inf

    def failure(self, scores: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return why the scores fail this gate, with the interval; None if they pass."""
        score = scores.get(self.score)
        if score is None:
            return f"{self.score}: not measured"
        low, high = score["low"], score["high"]
        if low is None or high is None:  # one item or one passage
            return f"{self.score}: expected an interval, got none from {score['n']} items"
        measured = f"the interval is {low:.3f} to {high:.3f} ({score['n']} items)"
        if not high <= self.max_value:  # also NaN
            return f"{self.score}: expected at most {self.max_value:g}, {measured}"
        if not low >= self.min_value:
            return f"{self.score}: expected at least {self.min_value:g}, {measured}"
        return None


def read_gates(path: str | Path, measures: Sequence[str] = ()) -> list[GateBound]:
    """Read a file of gates.

    Args:
        measures: the run's measures, the first parts of the names of its scores. A gate on another
            measure is refused before any work.

    InputError names the file and the field.
    """
    table, _ = read_toml(path)
    gates = []
    for i, entry in enumerate(validate(table, GateFile, str(path), extra="forbid")["gate"]):
        score, location = entry["score"], f"{path}: gate[{i}]"
        if measures and score.split(".")[0] not in measures:
            raise InputError(
                f"{location}.score: expected one of {', '.join(measures)} before the first dot, got"
                f" {score:.80}"
            )
        if "max" not in entry and "min" not in entry:
            raise InputError(f"{location}: expected max or min, got neither")
        gates.append(GateBound(score, entry.get("max", math.inf), entry.get("min", -math.inf)))
    return gates


def gate_failures(
    gates: Sequence[GateBound],
    scores: Mapping[str, Mapping[str, Any]],
    withdrawn: Mapping[str, str] | None = None,
) -> list[str]:
    """Return why each gate that fails does so. ``withdrawn``: why scores are withheld."""
    failures = []
    for gate in gates:
        if reason := (withdrawn or {}).get(gate.score):
            failures.append(f"{gate.score}: expected a score, got none: {reason}")
        elif failure := gate.failure(scores):
            failures.append(failure)
    return failures
