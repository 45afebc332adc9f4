"""The scores of the stages under one set of names, for the gates of `fastlm gate`."""

import math
from pathlib import Path
from typing import Annotated, NotRequired

from annotated_types import Gt
from typing_extensions import TypedDict

from fastlm.feedback.model_pair import Model
from fastlm.schema import Count, Finite, read_document


class JudgeError(TypedDict):
    """How a judge agreed with people: in its own domain, and ``elsewhere``."""

    domain: str
    agreement: tuple[Count, Count]
    kappa: Finite
    elsewhere: NotRequired[list["JudgeError"]]


class Score(TypedDict):
    """A value with its interval; of one item nothing is known of it."""

    value: Finite | None
    low: Finite | None
    high: Finite | None
    n: Count
    judge: NotRequired[JudgeError]
    corrected: NotRequired[bool]


class Comparison(TypedDict):
    """The last model of an eval less the first, by one measure."""

    measure: str
    difference: Finite | None
    low: Finite | None
    high: Finite | None
    n: Count


class TaskScores(TypedDict):
    name: str
    compared: list[Comparison]


class ModelScores(TypedDict, total=False):
    bits_per_byte: Annotated[Finite, Gt(0)]
    tokens: Count
    scores: dict[str, Score]


class Scores(TypedDict, total=False):
    """What is read of the scores.json of winrate, eval and safety."""

    scores: dict[str, Score]
    models: dict[str, ModelScores]
    tasks: list[TaskScores]
    ids: list[Model]


def read_scores(path: str | Path) -> Scores:
    """Read a scores.json. InputError: unreadable, or the scores of another program."""
    return read_document(path, Scores)


def scores_of(stage: str, table: Scores) -> dict[str, Score]:
    """Return name -> value with interval, of what a stage called ``stage`` measured
    (``scores.json``). Names begin with the stage's:

    - of winrate: winrate.rate, winrate.length, ...;
    - of eval of several models: eval.bits_per_byte (the last model's, divided by the first's; no
      interval: it is the same text) and, per question set and measure, eval.SET.MEASURE, the last
      model's less the first's;
    - of safety: safety.SCORE of the last model, and of several models safety.SCORE.change, the last
      model's less the first's.
    """
    named = {f"{stage}.{name}": score for name, score in table.get("scores", {}).items()}
    models = table.get("models", {})
    if not models:
        return named
    first, *_, last = [*models.values()] * 2
    for name, score in last.get("scores", {}).items():
        named[f"{stage}.{name}"] = score
        if len(models) > 1 and (before := first.get("scores", {}).get(name)):
            named[f"{stage}.{name}.change"] = difference(score, before)
    if "bits_per_byte" in last and "bits_per_byte" in first:
        ratio = last["bits_per_byte"] / first["bits_per_byte"]
        named[f"{stage}.bits_per_byte"] = {
            "value": ratio, "low": ratio, "high": ratio, "n": last.get("tokens", 0),
        }  # fmt: skip
    for task in table.get("tasks", ()):
        for row in task["compared"]:
            named[f"{stage}.{task['name']}.{row['measure']}"] = {
                "value": row["difference"], "low": row["low"], "high": row["high"], "n": row["n"],
            }  # fmt: skip
    return named


def difference(new: Score, old: Score) -> Score:
    """Return new less old from their own intervals (Zou and Donner 2008, doi:10.1002/sim.3095). The
    items are the same, so that the true interval is no wider. Without one interval there is none.
    """
    measured: Score = {"value": None, "low": None, "high": None, "n": new["n"]}
    if "judge" in new:
        measured["judge"] = new["judge"]
    if "corrected" in new:
        measured["corrected"] = new["corrected"]
    numbers = [new["value"], new["low"], new["high"], old["value"], old["low"], old["high"]]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return measured
    value, low, high, before, before_low, before_high = known
    down = math.hypot(value - low, before_high - before)
    up = math.hypot(high - value, before - before_low)
    change = value - before
    return {**measured, "value": change, "low": change - down, "high": change + up}
