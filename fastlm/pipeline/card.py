"""Write a model card in Hugging Face's form, from the records of the registry alone.

The card says where nothing was recorded. Every text from outside (names, sources, licences,
options) is escaped, so that it cannot become markup of the card: huggingface_hub writes the YAML,
and the template (parts/card.md.jinja) escapes each value.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.pipeline.lineage import NOT_RECORDED
from fastlm.pipeline.recipe import Kinds
from fastlm.pipeline.record import models_in, scores
from fastlm.pipeline.registry import DELETED, PRESENT, SHORT, Registry, RunRecord
from fastlm.pipeline.stage import Stage
from fastlm.pipeline.templates import Safe, card_environment, code_span, with_front_matter
from fastlm.pipeline.text import figure, seconds_text

CARD = "README.md"
ERRORS = ("error", "stderr", "low", "high", "interval", "ci")  # in names of figures: intervals
ROWS = ("rows_read", "conversations", "pairs", "comparisons", "prompts", "heldout")
Figures = Mapping[str, float]


def card(
    registry: Registry,
    record: RunRecord,
    *,
    kinds: Kinds,
    licence: str | None = None,
    language: str | None = None,
) -> str:
    """Return the text of README.md for the model that ``record`` made. ``licence`` (an id of
    Hugging Face's) and ``language`` (an ISO 639 code) are what its owner states.

    InputError: the record made no model.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if record.model is None:
        raise InputError(f"{record.name}: expected a model, got {record.entry.kind}")
    lineage = registry.ancestors(record)
    external = [
        (stage, input)
        for stage in lineage
        for key, input, maker in registry.parents(stage)
        if maker is None and key in ("model", "teacher", "reward_model", "base")
    ]
    measured = [*_measured(registry, record)]
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=stage.name, dataset_name=_data_of(stage),
            metric_type=key.rpartition(".")[2], metric_name=key, metric_value=value,
        )
        for stage, figures in measured
        for key, value, _ in _table(figures)
    ]  # fmt: skip
    front = ModelCardData(
        license=licence or "unknown", library_name="fastlm", pipeline_tag="text-generation",
        language=[language] if language else None,
        model_name=record.name, eval_results=results or None,
        metrics=[*dict.fromkeys(result.metric_type for result in results)] or None,
        tags=["fastlm", f"fastlm-id:{record.model}"],
        base_model=[input["name"] for _, input in external] or None,
        datasets=[*dict.fromkeys(s["spec"] for r in lineage for s in r.provenance.sources)] or None,
    )  # fmt: skip
    sections: dict[str, list[tuple[RunRecord, Figures]]] = {"Evaluation": [], "Safety": []}
    for stage, figures in measured:
        sections[_kind(stage, kinds).card_section].append((stage, figures))
    oldest_first = lineage[::-1]
    origins, code = [r.provenance for r in oldest_first], record.provenance.code
    body = _template(registry, kinds).render(
        name=record.name, kind=record.entry.kind, finished_at=record.finished_at, id=record.model,
        not_recorded=NOT_RECORDED, outside=external, sections=sections.items(),
        data=[r for r in oldest_first if r.provenance.sources],
        stages=[r for r in oldest_first if not {"scores", "corpus"} & r.entry.outputs.keys()],
        instructed=external or any(_kind(r, kinds).instructs for r in lineage),
        changed=", ".join(r.name for r in lineage if r.state != PRESENT),
        commands=[*dict.fromkeys(p.command for p in origins if p.command)],
        code=_facts(code) if all(p.code == code for p in origins) else "",
        recipe=_recipe(lineage),
    )  # fmt: skip
    return with_front_matter(front, body)


def _template(registry: Registry, kinds: Kinds) -> Any:
    environment = card_environment()
    environment.filters |= {
        "facts": _facts, "funnel": _funnel, "rows": _rows,
        "parents": registry.parents, "data_of": _data_of, "table": _table, "counts": _counts,
        "short": lambda id: code_span((id or NOT_RECORDED)[:SHORT]),
        "count": lambda count: f"{count:,}" if count else NOT_RECORDED,
        "seconds": lambda value: NOT_RECORDED if value is None else seconds_text(value),
        "options": lambda table: Safe(", ".join(code_span(f"{k} = {v}") for k, v in table.items())),
        "training": lambda record: bool(_kind(record, kinds).checkpoints),
        "trained": _trained, "figure": figure,
    }  # fmt: skip
    return environment.get_template("card.md.jinja")


def _kind(record: RunRecord, kinds: Kinds) -> type[Stage]:
    """Return the class of the stage that made the outputs."""
    stage = kinds.get(record.entry.kind, Stage)
    return kinds.get(str(record.entry.options.get(stage.kind_in)), stage)


def _facts(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in table.items() if v is not None)


def _trained(record: RunRecord) -> str:
    figures = scores(record.entry)
    return ", ".join(
        f"{k} {figure(v)}" for k, v in figures.items() if k in ("steps", "tokens", "loss")
    )


def _funnel(record: RunRecord) -> list[tuple[str, str, str, str]] | None:
    try:
        steps = Funnel.load(record.path / FUNNEL).steps if record.state != DELETED else None
    except InputError:
        return None
    rows = []
    for step in steps or ():
        removed = {**step["removed"], **step.get("replaced", {}), **step.get("cut", {})}
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in removed.items() if n)
        megabytes = f"{step['bytes'] / 1e6:,.2f}"
        rows.append((step["step"], f"{step['documents']:,}", megabytes, reasons))
    return rows or None


def _rows(record: RunRecord) -> str:
    result = record.entry.result or {}
    numbers = [(result.get(name), name.replace("_", " ")) for name in ROWS]
    counts = result.get("counts")
    if isinstance(counts, Mapping):
        numbers += [(n, reason) for reason, n in counts.items()]
    return ", ".join(f"{n:,} {name}" for n, name in numbers if isinstance(n, int))


def _measured(registry: Registry, record: RunRecord) -> Iterator[tuple[RunRecord, Figures]]:
    """Yield the stages that measured this model, each with its figures."""
    for stage in registry.records:
        if stage.ids.keys() == {"scores"} and record.model in set(stage.input_ids()):
            inputs = stage.provenance.inputs.get("model", [])
            names = {read["name"] for read in inputs if read["id"] == record.model}
            if models_in(stage.entry) and not names:
                continue  # it is the judge, or another one to compare with
            if figures := scores(stage.entry, names):
                yield stage, figures


def _table(figures: Figures) -> Iterator[tuple[str, float, str]]:
    """Yield name, value and error or interval of each measurement, without counts (integers)."""
    measured = [k for k, v in figures.items() if isinstance(v, float)]
    for key in measured:
        if not any(_bounds(key, other) for other in measured):
            bounds = [b for b in figures if _bounds(b, key)]
            texts = [f"{b[len(key) + 1 :]} {figure(figures[b])}" for b in bounds]
            yield key, figures[key], ", ".join(sorted(texts))


def _bounds(bound: str, key: str) -> bool:
    """Return whether a figure is an interval or error of another: accuracy_error, accuracy.low."""
    last = bound.rpartition(".")[2].rpartition("_")[2]
    return last in ERRORS and bound.startswith((f"{key}_", f"{key}."))


def _counts(figures: Figures) -> str:
    return ", ".join(f"{k} {v:,}" for k, v in figures.items() if isinstance(v, int))


def _data_of(record: RunRecord) -> str:
    return (
        ", ".join(read["name"] for read in record.provenance.inputs.get("data", [])) or NOT_RECORDED
    )


def _recipe(lineage: Sequence[RunRecord]) -> list[str]:
    """Return the lines of the recipe, none if the stage ran alone."""
    for record in lineage:
        path = record.path.parent / "recipe.json"
        if record.provenance.recipe and path.is_file():
            return json.dumps(read_json(path), indent=1, ensure_ascii=False).splitlines()
    return []


def model_folder(record: RunRecord) -> Path:
    """Return the folder of the model, which is where its card belongs."""
    outputs = record.entry.outputs
    kind = next(kind for kind in outputs if kind in record.ids and kind != "scores")
    return record.path / outputs[kind]
