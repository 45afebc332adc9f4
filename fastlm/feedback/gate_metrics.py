"""Read the scores of the stages under one set of names, for the gates of `fastlm gate`."""

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
class ModelId:
    """A model by its ``name`` (a stage or a path) and the ``id`` of its content
    (`fastlm.evals.suite.model_id`), which stays the same when the model is moved or copied. A
    quantized model has its own id: its scores are not those of the original model.
    """

    name: str
    id: str

    def __str__(self) -> str:
        return f"{self.name} (id {self.id[:SHORT]})"


class JudgeAgreement(TypedDict):
    """The agreement of a judge with people: in its own domain and in ``other_domains``."""

    domain: str
    agreement: tuple[Count, Count]
    kappa: Finite
    other_domains: NotRequired[list["JudgeAgreement"]]


class MetricValue(TypedDict):
    """A value with its interval, which is None for one item."""

    value: Finite | None
    low: Finite | None
    high: Finite | None
    n: Count
    judge: NotRequired[JudgeAgreement]
    corrected: NotRequired[bool]


class MetricDifference(TypedDict):
    """The difference of the last and the first model of an eval, by one metric."""

    metric: str
    difference: Finite | None
    low: Finite | None
    high: Finite | None
    n: Count


class TaskScores(TypedDict):
    """The differences of one task."""

    name: str
    comparisons: list[MetricDifference]


class ModelScores(TypedDict, total=False):
    """The scores of one model."""

    bits_per_byte: Annotated[Finite, Gt(0)]
    tokens: Count
    scores: dict[str, MetricValue]


class ScoresFile(TypedDict, total=False):
    """The fields of the scores.json of winrate, judge, eval and safety that gates use."""

    scores: dict[str, MetricValue]
    models: dict[str, ModelScores]
    tasks: list[TaskScores]
    ids: list[ModelId]


def read_scores(path: str | Path) -> ScoresFile:
    """Read a scores.json. InputError: unreadable, or the scores of another program."""
    return read_document(path, ScoresFile)


def models_of(tables: Sequence[tuple[str, Sequence[ModelId]]]) -> dict[str, ModelId]:
    """Return the models, `OLD` and `NEW`, that all scores are about. ``tables`` has the folder and
    the "ids" of each: the first model is the old one, the last the new one, a single one the new
    one. InputError: the scores are about different models.
    """
    first: dict[str, tuple[str, ModelId]] = {}
    for folder, models in tables:
        pair = [(NEW, model) for model in models[-1:]]
        if len(models) > 1:
            pair.insert(0, (OLD, models[0]))
        for key, model in pair:
            first_folder, first_model = first.setdefault(key, (folder, model))
            if first_model.id != model.id:
                raise InputError(
                    f"scores: expected scores of one {key} model, got {first_folder} of"
                    f" {first_model} and {folder} of {model}"
                )
    return {key: first[key][1] for key in (OLD, NEW) if key in first}


def percent(score: Mapping[str, float]) -> str:
    """Format a share with its interval."""
    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def scores_of(stage: str, table: ScoresFile) -> dict[str, MetricValue]:
    """Return name -> value with interval, from the ``scores.json`` of a stage called ``stage``.
    Names begin with the stage's:

    - of winrate: winrate.rate, winrate.length, ...;
    - of judge: judge.pass, judge.win_rate, ...;
    - of eval of several models: eval.bits_per_byte (the last model's, divided by the first's; no
      interval: it is the same text) and, per question set and metric, eval.SET.METRIC, the last
      model's less the first's;
    - of safety: safety.SCORE of the last model, and of several models safety.SCORE.change, the last
      model's less the first's.
    """
    scores = {**table.get("scores", {})}
    models = [*table.get("models", {}).values()]
    if models:
        first, last = models[0], models[-1]
        for name, score in last.get("scores", {}).items():
            scores[name] = score
            if len(models) > 1 and (before := first.get("scores", {}).get(name)):
                scores[f"{name}.change"] = difference(score, before)
        if "bits_per_byte" in last and "bits_per_byte" in first:
            ratio = last["bits_per_byte"] / first["bits_per_byte"]
            scores["bits_per_byte"] = _score(ratio, ratio, ratio, last.get("tokens", 0))
        for task in table.get("tasks", ()):
            for row in task["comparisons"]:
                scores[f"{task['name']}.{row['metric']}"] = _score(
                    row["difference"], row["low"], row["high"], row["n"]
                )
    return {f"{stage}.{name}": score for name, score in scores.items()}


def _score(value: float | None, low: float | None, high: float | None, n: int) -> MetricValue:
    return {"value": value, "low": low, "high": high, "n": n}


def difference(new: MetricValue, old: MetricValue) -> MetricValue:
    """Return new less old, with an interval from their own intervals (Zou and Donner 2008,
    doi:10.1002/sim.3095). The items are the same, so that the true interval is no wider. If one has
    no interval, the difference has none.
    """
    numbers = [score[key] for score in (new, old) for key in ("value", "low", "high")]
    finite = [number for number in numbers if number is not None]
    ends: tuple[float | None, float | None, float | None] = (None, None, None)
    if len(finite) == len(numbers):
        value, low, high, before, before_low, before_high = finite
        change = value - before
        down = math.hypot(value - low, before_high - before)
        up = math.hypot(high - value, before - before_low)
        ends = change, change - down, change + up
    return {**new, **_score(*ends, new["n"])}
