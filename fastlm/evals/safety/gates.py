"""Gates: bounds on scores, in a TOML file. A gate bounds the end of the interval, not the point.

    [[gate]]
    score = "attacks.harmbench.plain"
    max = 0.2                # the interval's upper end is at most this

    [[gate]]
    score = "bias.stereoset.language_model"
    min = 0.7                # its lower end is at least this

So a gate passes only where there are items enough to say so, and more items never make a model
fail that is good enough.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.schema import Field, Finite, Name, read_toml, validate


class Entry(TypedDict):
    score: Name
    max: NotRequired[Finite]
    min: NotRequired[Finite]


class File(TypedDict):
    gate: Annotated[list[Entry], MinLen(1)]


@dataclass(frozen=True)
class Gate:
    score: str
    most: float = math.inf
    least: float = -math.inf

    def failure(self, scores: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return why these scores fail the gate, with the interval; None if they pass."""
        found = scores.get(self.score)
        if found is None:
            return f"{self.score}: not measured"
        low, high = found["low"], found["high"]
        if low is None or high is None:  # of one item, or one passage
            return f"{self.score}: no interval follows from so few items ({found['n']})"
        measured = f"the interval is {low:.3f} to {high:.3f} ({found['n']} items)"
        if not high <= self.most:  # also NaN
            return f"{self.score}: wanted at most {self.most:g}, {measured}"
        if not low >= self.least:
            return f"{self.score}: wanted at least {self.least:g}, {measured}"
        return None


def read_gates(path: str | Path, measures: Sequence[str] = ()) -> list[Gate]:
    """Read a file of gates.

    Args:
        measures: first parts of the names of scores that the run measures; a gate on another is
            refused before any work.

    InputError names the file and the line of what is wrong.
    """
    table, text = read_toml(path)
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*\[\[\s*gate\s*\]\]", line)]

    def where(field: Field) -> str:
        """The file and line of a field such as ("gate", 1, "max")."""
        key, index, *_ = [*field, "", ""]
        if not isinstance(index, int):
            return f"{path}:{_line(lines, str(key))}"
        start = starts[index] if index < len(starts) else 0  # gates as one inline list
        return f"{path}:{_line(lines, str(field[2]) if len(field) > 2 else 'gate', start)}"

    gates = []
    for index, entry in enumerate(validate(table, File, where, extra="forbid")["gate"]):
        score = entry["score"]
        if measures and score.split(".")[0] not in measures:
            named = ", ".join(measures)
            raise InputError(
                f"{where(('gate', index, 'score'))}: gate[{index}].score: expected one of {named}"
                f" before the first dot, got {score:.80}"
            )
        if "max" not in entry and "min" not in entry:
            raise InputError(
                f"{where(('gate', index, 'score'))}: gate[{index}]: expected max or min, got"
                " neither"
            )
        gates.append(Gate(score, entry.get("max", math.inf), entry.get("min", -math.inf)))
    return gates


def _line(lines: list[str], key: str, start: int = 0) -> int:
    """Return the number of the line, from line ``start`` on, that sets ``key``; else that line."""
    pattern = re.compile(rf"\s*(?:\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*(?:=|\]|\.)")
    for i in range(start, len(lines)):
        if i > start and re.match(r"\s*\[\[", lines[i]):
            break
        if pattern.match(lines[i]):
            return i + 1
    return start + 1


def failures(gates: Sequence[Gate], scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [why for gate in gates if (why := gate.failure(scores)) is not None]


def doubts(gates: Sequence[Gate], scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each gate whose score a judge decided that is no better than chance on the
    answers of some model (kappa of 0 or less), and was not measured on those of this one.
    """
    lines = []
    for gate in gates:
        score = scores.get(gate.score, {})
        if "judge" not in score or score.get("corrected"):
            continue
        for error in (score["judge"], *score["judge"].get("elsewhere", ())):
            if error.get("kappa", 1.0) <= 0.0:
                agreed, n = error["agreement"]
                lines.append(
                    f"{gate.score} decides nothing: its judge agreed with people on {agreed} of"
                    f" {n} answers of {error['domain']} (kappa {error['kappa']:.2f}), which is"
                    " chance; label answers of this model (docs/safety.md)"
                )
                break
    return lines
