"""Tasks asked of several models, measured, and the models compared on the same questions."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastlm.evals.asking import ask, schema_of
from fastlm.evals.measures import (
    HEADLINE,
    Values,
    as_json,
    parts,
    passages,
    summary,
    values,
)
from fastlm.evals.results import Results
from fastlm.evals.scorer import Scorer
from fastlm.evals.task import Task
from fastlm.pipeline.stage import Input
from fastlm.progress import silent
from fastlm.sources.packages import model_path
from fastlm.stats.intervals import compare, holm

DIGITS = 16  # of an id, in the names of records


def ask_all(
    tasks: Sequence[Task],
    scorer: Scorer,
    folder: Path,
    *,
    model: str,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    track: Callable = silent,
) -> list[dict[str, Any]]:
    """Ask one model all tasks; return per task what `measured` wants.

    Args:
        folder: of the records; a task that has all of its own is not asked again.
        model: a hash of the model, without which records of another one could be taken for its own.

    InputError: a set whose answers this machine cannot judge, before any set is asked.
    """
    for task in tasks:
        if task.check is not None and not (folder / _file_of(task)).exists():
            task.check()
    found = []
    for task in track(tasks, "question sets", unit="sets"):
        options = {"seed": seed, "samples": samples, "temperature": temperature}
        about = {"task": task.name, "hash": task.hash, "model": model}
        if task.judge is not None:
            about |= options | {"judge": f"{task.judge.__module__}.{task.judge.__qualname__}"}
        began = time.perf_counter()
        with Results(folder / _file_of(task), about, schema_of(task)) as results:
            held = len(results.records)
            records = ask(task, scorer, results, **(options if task.open else {}))
        took = time.perf_counter() - began
        found.append(
            {
                "values": values(task, records),
                "cut": sum(bool(record.get("cut")) for record in records),
                **({} if held else {"seconds": took}),
            }
        )
    return found


def _file_of(task: Task) -> str:
    return f"{task.name.replace('/', '_')}-{task.hash}.jsonl"


def measured(
    tasks: Sequence[Task], asked: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return, per task, what it is and each model's measures; and, of several models, the others
    compared with the first.

    asked: model -> what `ask_all` returned.
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
            each = as_json(summary(task, result["values"]))
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
    return {"model": name, "with": first, "measure": measure, **known}


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


def headline(row: Mapping[str, Any]) -> str:
    """The measure of a task that its tables begin with."""
    (some, *_) = row["models"].values()
    return HEADLINE if HEADLINE in some["measures"] else next(iter(some["measures"]))


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
