"""Metrics of several models on tasks, and their comparison on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.evals.task import Task
from fastlm.evals.task_metrics import (
    HEADLINE,
    finite_or_none,
    is_share,
    part_metrics,
    passage_clusters,
    summarize_metrics,
)
from fastlm.pipeline.stage import Input
from fastlm.sources.packages import model_path
from fastlm.stats.intervals import compare, holm

HASH_DIGITS = 16  # of an id, in the names of records


def compare_models(
    tasks: Sequence[Task], results_of: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return an entry per task with each model's metrics, and the comparison of each further model
    with the first.

    results_of: model -> the result of `fastlm.evals.runner.run_tasks`.
    """
    rows = [
        _compare_on_task(task, {name: results[i] for name, results in results_of.items()})
        for i, task in enumerate(tasks)
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        for comparison in row["comparisons"]:
            groups.setdefault((comparison["model"], comparison["metric"]), []).append(comparison)
    for group in groups.values():  # per model and metric, adjusted for the number of tasks
        for comparison, p in zip(
            group, holm([comparison["p"] for comparison in group]), strict=True
        ):
            comparison["p_adjusted"] = p
    return rows


def _compare_on_task(task: Task, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        values = summarize_metrics(task, result["values"]) | result["overall"]
        metrics = {key: m | _unit(key, result["values"].get(key)) for key, m in values.items()}
        models[name] = {
            "metrics": metrics,
            **({"truncated": result["truncated"]} if result["truncated"] else {}),
        }
        if by_part := part_metrics(task, result["values"]):
            models[name]["parts"] = by_part
    first, *others = results
    comparisons = []
    for name in others:
        for metric, base in results[first]["values"].items():
            values = results[name]["values"][metric]
            comparison = finite_or_none(
                asdict(compare(values, base, clusters=passage_clusters(task)))
            )
            row = {"model": name, "baseline": first, "metric": metric, **comparison}
            comparisons.append(row | _unit(metric, values))
    part_groups = (
        {"part_groups": list(dict.fromkeys(task.group_of_part.values()))}
        if task.group_of_part
        else {}
    )
    return {
        "name": task.name, "ability": task.ability, "format": task.format, "hash": task.hash,
        "source": task.source, "licence": task.licence, "questions": len(task.questions),
        "normalisation": task.normalisation, "chance": task.chance, "models": models, **part_groups,
        "comparisons": comparisons,
    }  # fmt: skip


def _unit(metric: str, values: np.ndarray | None) -> dict[str, str]:
    """Return the unit of a metric that is not a share; tables show shares in percent."""
    is_figure = metric != HEADLINE and (values is None or not is_share(values))
    return {"unit": ""} if is_figure else {}


def model_id(model: str | Path) -> str:
    """Return the id of a model: a folder, a .gguf file or a model in a package. An adapter's id
    includes its base."""
    from fastlm.checkpoint.digest import model_digest

    return model_digest(model_path(model))


def model_hash(model: str | Path) -> str:
    """Return the first digits of a model's id, which records use."""
    return model_id(model)[:HASH_DIGITS]


def model_ids(models: Sequence[Input]) -> list[dict[str, str]]:
    """Return names and ids of models for scores.json, from the old to the new one."""
    return [{"name": model.name, "id": model_id(model.source)} for model in models]
