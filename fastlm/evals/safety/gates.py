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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_text

KEYS = ("score", "max", "min")


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
    text = read_text(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at (?:line (\d+)|end of document)", str(error))
        line = place[1] if place and place[1] else str(len(text.splitlines()))
        raise InputError(f"{path} line {line}: {str(error).split(' (at')[0]}") from None
    lines = text.splitlines()
    for key in table:
        if key != "gate":
            raise InputError(f"{path} line {_line(lines, key)}: wanted [[gate]], got {key!r}")
    entries = table.get("gate", [])
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} line 1: wanted at least one [[gate]], got none")
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*\[\[\s*gate\s*\]\]", line)]
    starts += [0] * (len(entries) - len(starts))  # gates as one inline list
    return [
        _gate(entry, lines, start, path, measures)
        for entry, start in zip(entries, starts, strict=False)
    ]


def _gate(
    entry: Any, lines: list[str], start: int, path: str | Path, measures: Sequence[str]
) -> Gate:
    def refuse(key: str, what: str) -> InputError:
        return InputError(f"{path} line {_line(lines, key, start)}: {what}")

    if not isinstance(entry, dict):
        raise refuse("gate", f"wanted a table with score, max or min, got {entry!r:.60}")
    for key in entry:
        if key not in KEYS:
            raise refuse(key, f"wanted one of {', '.join(KEYS)}, got {key!r}")
    score = entry.get("score")
    if not isinstance(score, str) or not score:
        raise refuse("score", f"score: wanted the name of a score, got {score!r:.60}")
    if measures and score.split(".")[0] not in measures:
        raise refuse(
            "score", f"score: wanted one of {', '.join(measures)} before the first dot, got {score}"
        )
    bounds = {}
    for key in ("max", "min"):
        if (value := entry.get(key)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise refuse(key, f"{key}: wanted a number, got {value!r:.60}")
        bounds[key] = float(value)
    if not bounds:
        raise refuse("score", f"{score}: wanted max or min, got neither")
    return Gate(score, bounds.get("max", math.inf), bounds.get("min", -math.inf))


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
