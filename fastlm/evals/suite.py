"""Tasks that several models were asked, measured, and the models compared on the same questions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.evals.measures import HEADLINE, Values, as_json, is_share, parts, passages, summary
from fastlm.evals.task import Task
from fastlm.pipeline.stage import Input
from fastlm.sources.packages import model_path
from fastlm.stats.intervals import compare, holm

DIGITS = 16  # of an id, in the names of records


def measured(
    tasks: Sequence[Task], asked: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return, per task, what it is and each model's measures; and, of several models, the others
    compared with the first.

    asked: model -> what `fastlm.evals.runner.ask_all` returned.
    """
    found = []
    for i, task in enumerate(tasks):
        own = {name: results[i] for name, results in asked.items()}
        row: dict[str, Any] = {
            "name": task.name, "ability": task.ability, "format": task.format, "hash": task.hash,
            "source": task.source, "licence": task.licence, "questions": len(task.questions),
            "normalisation": task.normalisation, "chance": task.chance, "models": {},
        }  # fmt: skip
        if task.wider:
            row["wider"] = list(dict.fromkeys(task.wider.values()))
        for name, result in own.items():
            each = as_json(summary(task, result["values"])) | result["overall"]
            for measure, value in each.items():
                value |= _unit(measure, result["values"].get(measure))
            kept = {k: result[k] for k in ("cut", "seconds") if result.get(k)}
            row["models"][name] = {"measures": each, **kept}
            if by_part := parts(task, result["values"]):
                row["models"][name]["parts"] = by_part
        first, *others = own
        row["compared"] = [
            _compared(task, own, name, first, measure)
            for name in others
            for measure in own[first]["values"]
        ]
        found.append(row)
    _adjust(found)
    return found


def _compared(
    task: Task, own: Mapping[str, Any], name: str, first: str, measure: str
) -> dict[str, Any]:
    clusters = passages(task)
    a: Values = own[name]["values"]
    told = asdict(compare(a[measure], own[first]["values"][measure], clusters=clusters))
    known = {key: None if _unknown(value) else value for key, value in told.items()}
    unit = _unit(measure, a[measure])
    return {"model": name, "with": first, "measure": measure, **known, **unit}


def _unit(measure: str, each: np.ndarray | None) -> dict[str, str]:
    """What tells a measure that is no share, of which tables show percent."""
    is_figure = measure != HEADLINE and (each is None or not is_share(each))
    return {"unit": ""} if is_figure else {}


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _adjust(found: list[dict[str, Any]]) -> None:
    """Add p-values adjusted for the number of tasks: per model and measure (Holm)."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        for one in row["compared"]:
            alike.setdefault((one["model"], one["measure"]), []).append(one)
    for ones in alike.values():
        for one, p in zip(ones, holm([one["p"] for one in ones]), strict=True):
            one["p_adjusted"] = p


def id_of(model: str | Path) -> str:
    """The id of a model: a folder, a .gguf file, or a model in a package; of an adapter with its
    base."""
    from fastlm.checkpoint.digest import digest_of

    return digest_of(model_path(model))


def hash_of(model: str | Path) -> str:
    """The first digits of the id of a model, by which records of answers name it."""
    return id_of(model)[:DIGITS]


def ids_of(models: Sequence[Input]) -> list[dict[str, str]]:
    """The names and ids of models, as scores.json has them: from the old one to the new one."""
    return [{"name": model.name, "id": id_of(model.where)} for model in models]
