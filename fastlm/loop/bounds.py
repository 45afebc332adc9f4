"""Bounds on scores (`read_gates`), and the scores of the stages under one set of names."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_text

Score = dict[str, Any]  # value, low, high, n


def scores_of(stage: str, table: Any) -> dict[str, Score]:
    """Return name -> value with interval, of what a stage called ``stage`` measured
    (``scores.json``). Names begin with the stage's:

    - of winrate: winrate.rate, winrate.length, ...;
    - of eval of several models: eval.bits_per_byte (the last model's, divided by the first's; no
      interval: it is the same text) and, per question set and measure, eval.SET.MEASURE, the last
      model's less the first's;
    - of safety: safety.SCORE of the last model.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"scores: wanted the scores.json of a stage, got {type(table).__name__}")
    found: dict[str, Score] = {}
    for name, score in table.get("scores", {}).items():
        found[f"{stage}.{name}"] = dict(score)
    models = table.get("models", {})
    if models:
        first, *_, last = [*models.values()] * 2
        for name, score in last.get("scores", {}).items():
            found[f"{stage}.{name}"] = dict(score)
        if "bits_per_byte" in last:
            ratio = last["bits_per_byte"] / first["bits_per_byte"]
            found[f"{stage}.bits_per_byte"] = {
                "value": ratio, "low": ratio, "high": ratio, "n": last.get("tokens", 0),
            }  # fmt: skip
        for task in table.get("tasks", ()):
            for one in task["compared"]:
                found[f"{stage}.{task['name']}.{one['measure']}"] = {
                    "value": one["difference"], "low": one["low"], "high": one["high"],
                    "n": one["n"],
                }  # fmt: skip
    return found


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
        measured = f"the interval is {low:.3f} to {high:.3f} ({found['n']} items)"
        if not high <= self.most:  # also NaN
            return f"{self.score}: wanted at most {self.most:g}, {measured}"
        if not low >= self.least:
            return f"{self.score}: wanted at least {self.least:g}, {measured}"
        return None


def read_gates(path: str | Path) -> list[Gate]:
    """Read [[gate]] tables with score, max and min. InputError: what is wrong in the file."""
    try:
        table = tomllib.loads(read_text(Path(path)))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: wanted TOML: {error}") from None
    entries = table.get("gate")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: wanted at least one [[gate]], got none")
    found = []
    for entry in entries:
        score = entry.get("score")
        bounds = {k: v for k, v in entry.items() if k in ("max", "min")}
        if not isinstance(score, str) or not bounds or len(entry) != 1 + len(bounds):
            raise InputError(f"{path}: wanted score with max or min, got {entry!r:.80}")
        found.append(Gate(score, bounds.get("max", math.inf), bounds.get("min", -math.inf)))
    return found
