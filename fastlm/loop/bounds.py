"""The scores of the stages under one set of names, for the gates of `fastlm gate`."""

import math
from collections.abc import Mapping
from typing import Any

from fastlm.errors import InputError

Score = dict[str, Any]  # value, low, high, n


def scores_of(stage: str, table: Any) -> dict[str, Score]:
    """Return name -> value with interval, of what a stage called ``stage`` measured
    (``scores.json``). Names begin with the stage's:

    - of winrate: winrate.rate, winrate.length, ...;
    - of eval of several models: eval.bits_per_byte (the last model's, divided by the first's; no
      interval: it is the same text) and, per question set and measure, eval.SET.MEASURE, the last
      model's less the first's;
    - of safety: safety.SCORE of the last model, and of several models safety.SCORE.change, the last
      model's less the first's.
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
            if len(models) > 1 and name in first.get("scores", {}):
                found[f"{stage}.{name}.change"] = difference(score, first["scores"][name])
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


def difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> Score:
    """Return new less old from their own intervals (Zou and Donner 2008, doi:10.1002/sim.3095). The
    items are the same, so that the true interval is no wider.
    """
    value = new["value"] - old["value"]
    down = math.hypot(new["value"] - new["low"], old["high"] - old["value"])
    up = math.hypot(new["high"] - new["value"], old["value"] - old["low"])
    judge = {key: new[key] for key in ("judge", "corrected") if key in new}
    return {"value": value, "low": value - down, "high": value + up, "n": new["n"], **judge}
