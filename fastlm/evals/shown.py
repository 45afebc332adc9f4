"""The scores of an evaluation as tables, and as a part of report.html."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.evals.charts import differences_chart, scores_chart
from fastlm.evals.measures import HEADLINE
from fastlm.evals.tables import (
    COMPARED,
    HEADINGS,
    compared_lines,
    compared_table,
    lines,
    shown_columns,
    task_table,
)
from fastlm.evals.tables_of_parts import (
    CONTAMINATION,
    PARTS,
    contamination_lines,
    contamination_table,
    part_lines,
    part_table,
)
from fastlm.pipeline.charts import bits_chart
from fastlm.pipeline.stage import Job, Part
from fastlm.pipeline.text import size_text
from fastlm.train.metrics import METRICS, read_metrics

YARDSTICKS = {"xz": "xz -9e", "zstd": "zstd -19"}


def told(result: Mapping[str, Any]) -> str:
    """Return the line that a run shows."""
    values = {name: model["bits_per_byte"] for name, model in result["models"].items()}
    values |= _compressors(result)
    told = []
    if values:
        told.append("bits per byte: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    if tasks := result.get("tasks"):
        questions = sum(task["questions"] for task in tasks)
        told.append(f"{len(tasks)} question sets, {questions:,} questions")
    return "; ".join(told)


def tables(result: Mapping[str, Any]) -> Any:
    """Return what the command prints: a line per number of one model, a table for several and for
    tasks."""
    from rich.console import Group

    if tasks := result.get("tasks"):
        parts = [_table(result)] if result["models"] else []
        parts.append(task_table(tasks))
        parts += [t for make in (part_table, contamination_table) if (t := make(tasks))]
        if any(task["compared"] for task in tasks):
            parts.append(compared_table(tasks))
        return Group(*parts)
    if len(result["models"]) > 1 or any("domains" in m for m in result["models"].values()):
        return _table(result)
    (values,) = result["models"].values()
    packed = {k: v for k, v in result.items() if k not in ("models", "ids")}
    return "\n".join(
        f"{key}  {value:.4f}" if isinstance(value, float) else f"{key}  {value:,}"
        for key, value in {**values, **packed}.items()
    )


def part(job: Job, result: Mapping[str, Any]) -> Part:
    part = _bits_part(job, result) if result["models"] else Part("How well it answers")
    if tasks := result.get("tasks"):
        _add_tasks(part, tasks)
    return part


def _bits_part(job: Job, result: Mapping[str, Any]) -> Part:
    models = {name: model["bits_per_byte"] for name, model in result["models"].items()}
    best = min(models, key=lambda name: models[name])
    curves = {}
    for source in job.inputs["model"]:
        metrics = source.path.parent / METRICS  # next to the model that a training wrote
        if source.name in models and metrics.is_file():
            rows = read_metrics(metrics)
            if any("bits_per_byte" in row for row in rows):  # a fine-tuning has none
                curves[source.name] = rows
    packed = _compressors(result)
    of = "" if len(models) == 1 else f" ({best})"
    card = f"bits per byte of unseen text{of}"
    if packed:
        gain = 100 * (1 - models[best] / packed["xz -9e"])
        card += f", {abs(gain):.0f} % {'below' if gain >= 0 else 'above'} xz -9e"
    size = next(iter(result["models"].values()))["bytes"]
    documents = f"{result['documents']:,} held-out documents, " if "documents" in result else ""
    note = (
        f"{documents}{size_text(size)}. Bits per byte is what a compressor built on the model"
        " would need; lower is better."
    )
    if packed:
        note += " xz and zstd compress the same text. A bar is the difference to xz."
    return Part(
        "How well it predicts text it has never seen",
        note,
        charts=[bits_chart(curves, models, packed)] if curves else [],
        cards=[(f"{models[best]:.3f}", card)],
        template="eval.html.jinja",
        values={"bars": bars(models, packed)},
    )


def _add_tasks(part: Part, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Add question sets to a part of the report."""
    rows = list(lines(tasks))
    columns = shown_columns(rows)
    compared = list(compared_lines(tasks))
    # title, note, headings (text, whether it is on the left), rows
    tables = [
        (
            "Parts of the sets", "", [(name, i < 3) for i, name in enumerate(PARTS)],
            list(part_lines(tasks)),
        ),
        (
            "Are the questions in the training text?",
            "Touched: 13 tokens in a row of the question and its right answer stand there. Dirty:"
            " such runs cover 80 % of its tokens.",
            [(name, i < 2) for i, name in enumerate(CONTAMINATION)],
            list(contamination_lines(tasks)),
        ),
    ]  # fmt: skip
    charts = [scores_chart(tasks)]
    if any(one["measure"] == HEADLINE for task in tasks for one in task["compared"]):
        charts.append(differences_chart(tasks))
    part.template, part.wide = "eval.html.jinja", True
    part.title = "How well it predicts text, and answers questions"
    part.values = {
        **part.values,
        "headings": [(HEADINGS[key], key in ("set", "model")) for key in columns],
        "rows": [[row[key] for key in columns] for row in rows],
        "compared_headings": [(name, i < 3) for i, name in enumerate(COMPARED)],
        "compared": compared,
        "task_charts": charts,
        "tables": [table for table in tables if table[-1]],
        "sources": [
            {key: task[key] for key in ("name", "format", "hash", "source", "licence")}
            for task in tasks
        ],
    }
    questions = sum(task["questions"] for task in tasks)
    part.cards = [*part.cards, (f"{questions:,}", f"questions of {len(tasks)} sets answered")]


def _compressors(result: Mapping[str, Any]) -> dict[str, float]:
    """Return compressor -> bits per byte, {} if shards were measured."""
    return {
        name: result[f"bits_per_byte_{key}"]
        for key, name in YARDSTICKS.items()
        if f"bits_per_byte_{key}" in result
    }


def _table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("model", box=None)
    for heading in ("bits per byte", "loss", "tokens", "window"):
        table.add_column(heading, justify="right")
    for name, v in result["models"].items():
        table.add_row(
            name, f"{v['bits_per_byte']:.4f}", f"{v['loss']:.4f}", f"{v['tokens']:,}",
            f"{v['seq_len']:,}",
        )  # fmt: skip
        for domain, own in v.get("domains", {}).items():
            table.add_row(
                f"  {domain}", f"{own['bits_per_byte']:.4f}", "", f"{own['tokens']:,}", ""
            )
    for name, value in _compressors(result).items():
        table.add_row(name, f"{value:.4f}", "", "", "")
    return table


def bars(models: Mapping[str, float], packed: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return bits per byte of the compressors and the models, as bars of the difference to xz.

    Bars left of xz's line need fewer bits, bars right of it more. Bars from zero would be nearly
    equal. Without xz, the first model is the line.
    """
    line = packed.get("xz -9e", next(iter(models.values())))
    rows = [*sorted(packed.items(), key=lambda kv: kv[0], reverse=True), *models.items()]
    values = [value for _, value in rows]
    least, most = min(values), max(values)
    span = max(most - least, 0.1 * line)  # negligible differences stay short
    return [
        {
            "name": name, "value": value, "model": name in models,
            "change": 100 * (value / line - 1), "left": 100 * (min(value, line) - least) / span,
            "width": 100 * abs(value - line) / span, "line": 100 * (line - least) / span,
        }
        for name, value in rows
    ]  # fmt: skip
