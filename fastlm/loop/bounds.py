"""The scores of the stages under one set of names, for the gates of `fastlm gate`."""

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
