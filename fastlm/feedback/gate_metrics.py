"""The scores of the stages under one set of names, for the gates of `fastlm gate`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from annotated_types import Gt
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.schema import Count, Finite, read_document

OLD, NEW = "old", "new"
SHORT = 12  # characters of an id that are shown


@dataclass(frozen=True)
class Model:
    """A model by its ``name`` (a stage or a path) and the ``id`` of its content
    (`fastlm.evals.suite.id_of`), so that it may be moved or copied. A quantized model has an id of
    its own: what was measured of it says nothing about the model that it was made from.
    """

    name: str
    id: str

    def __str__(self) -> str:
        return f"{self.name} (id {self.id[:SHORT]})"


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


def models_of(tables: Sequence[tuple[str, Sequence[Model]]]) -> dict[str, Model]:
    """Return the models, `OLD` and `NEW`, that all scores are about; ``tables`` has the folder and
    the "ids" of each: the first is the old one, the last the new one, a single one the new one.
    InputError: they are about different ones.
    """
    found: dict[str, tuple[str, Model]] = {}
    for folder, models in tables:
        pair = [(NEW, model) for model in models[-1:]]
        if len(models) > 1:
            pair.insert(0, (OLD, models[0]))
        for key, model in pair:
            first, known = found.setdefault(key, (folder, model))
            if known.id != model.id:
                raise InputError(
                    f"scores: expected scores of one {key} model, got {first} of {known} and"
                    f" {folder} of {model}"
                )
    return {key: found[key][1] for key in (OLD, NEW) if key in found}


def percent(score: Mapping[str, float]) -> str:
    """A share with its interval."""
    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


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
    named = {**table.get("scores", {})}
    models = [*table.get("models", {}).values()]
    if models:
        first, last = models[0], models[-1]
        for name, score in last.get("scores", {}).items():
            named[name] = score
            if len(models) > 1 and (before := first.get("scores", {}).get(name)):
                named[f"{name}.change"] = difference(score, before)
        if "bits_per_byte" in last and "bits_per_byte" in first:
            ratio = last["bits_per_byte"] / first["bits_per_byte"]
            named["bits_per_byte"] = _score(ratio, ratio, ratio, last.get("tokens", 0))
        for task in table.get("tasks", ()):
            for row in task["compared"]:
                named[f"{task['name']}.{row['measure']}"] = _score(
                    row["difference"], row["low"], row["high"], row["n"]
                )
    return {f"{stage}.{name}": score for name, score in named.items()}


def _score(value: float | None, low: float | None, high: float | None, n: int) -> Score:
    return {"value": value, "low": low, "high": high, "n": n}


def difference(new: Score, old: Score) -> Score:
    """Return new less old from their own intervals (Zou and Donner 2008, doi:10.1002/sim.3095). The
    items are the same, so that the true interval is no wider. Without one interval there is none.
    """
    numbers = [score[key] for score in (new, old) for key in ("value", "low", "high")]
    known = [number for number in numbers if number is not None]
    ends: tuple[float | None, float | None, float | None] = (None, None, None)
    if len(known) == len(numbers):
        value, low, high, before, before_low, before_high = known
        change = value - before
        down = math.hypot(value - low, before_high - before)
        up = math.hypot(high - value, before - before_low)
        ends = change, change - down, change + up
    return {**new, **_score(*ends, new["n"])}
