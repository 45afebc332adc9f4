"""The results of `fastlm eval` and `fastlm safety`: a line, tables, and a part of report.html."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.evals.charts import (
    differences_chart,
    exposure_chart,
    memorization_chart,
    scores_chart,
)
from fastlm.evals.measures import HEADLINE
from fastlm.evals.tables import (
    Cell,
    Table,
    compared_table,
    contamination_table,
    part_table,
    task_table,
)
from fastlm.pipeline.charts import as_svg, bits_figure
from fastlm.pipeline.stage import Job, Part
from fastlm.pipeline.text import size_text
from fastlm.train.metrics import METRICS, read_metrics

YARDSTICKS = {"xz": "xz -9e", "zstd": "zstd -19"}
LEGEND = (
    "Below a score that a judge decided: whose answers people labelled; with the property found,"
    " and without it passed, of how many; kappa of judge and labels (0 is chance). Elsewhere the"
    ' judge\'s error is not known. A score is corrected for it where "this model" is labelled'
    " (--labels)."
)
# What eval.html.jinja draws, where there is any
EMPTY: Mapping[str, Any] = {
    "failed": (), "bars": (), "bits_charts": (), "table": None, "tables": (), "notes": (),
    "sources": None,
}  # fmt: skip

# fastlm eval


def eval_summary(result: Mapping[str, Any]) -> str:
    """Return the line that a run shows."""
    values = {name: model["bits_per_byte"] for name, model in result["models"].items()}
    values |= _compressors(result)
    parts = []
    if values:
        parts.append("bits per byte: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    if tasks := result.get("tasks"):
        questions = sum(task["questions"] for task in tasks)
        parts.append(f"{len(tasks)} question sets, {questions:,} questions")
    return "; ".join(parts)


def render_eval(result: Mapping[str, Any]) -> Any:
    """Return what the command prints: a line per number of one model, a table for several and for
    tasks."""
    from rich.console import Group

    if tasks := result.get("tasks"):
        found = [
            _bits_table(result) if result["models"] else None, task_table(tasks),
            part_table(tasks), contamination_table(tasks), compared_table(tasks),
        ]  # fmt: skip
        return Group(*(table.rich() for table in found if table is not None))
    if len(result["models"]) > 1 or any("domains" in m for m in result["models"].values()):
        return _bits_table(result).rich()
    (values,) = result["models"].values()
    packed = {k: v for k, v in result.items() if k not in ("models", "ids")}
    return "\n".join(
        f"{key}  {value:.4f}" if isinstance(value, float) else f"{key}  {value:,}"
        for key, value in {**values, **packed}.items()
    )


def eval_part(job: Job, result: Mapping[str, Any]) -> Part:
    part = _bits_part(job, result) if result["models"] else Part("How well it answers")
    part.template, part.values = "eval.html.jinja", {**EMPTY, **part.values}
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
        cards=[(f"{models[best]:.3f}", card)],
        values={
            "bars": bars(models, packed),
            "bits_charts": [as_svg(bits_figure(curves, models, packed))] if curves else [],
        },
    )


def _add_tasks(part: Part, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Add question sets to a part of the report."""
    charts = [scores_chart(tasks)]
    if any(one["measure"] == HEADLINE for task in tasks for one in task["compared"]):
        charts.append(differences_chart(tasks))
    sources = Table(
        ("set", "template", "hash", "source", "licence"),
        [[task[key] for key in ("name", "format", "hash", "source", "licence")] for task in tasks],
        left=5, title="Where the questions come from",
    )  # fmt: skip
    more = (compared_table(tasks), part_table(tasks), contamination_table(tasks), sources)
    part.wide = True
    part.title = "How well it predicts text, and answers questions"
    part.charts = charts
    part.values = {
        **part.values, "heading": "Question sets", "table": task_table(tasks),
        "tables": [table for table in more if table is not None],
    }  # fmt: skip
    questions = sum(task["questions"] for task in tasks)
    part.cards = [*part.cards, (f"{questions:,}", f"questions of {len(tasks)} sets answered")]


def _compressors(result: Mapping[str, Any]) -> dict[str, float]:
    """Return compressor -> bits per byte, {} if shards were measured."""
    return {
        name: result[f"bits_per_byte_{key}"]
        for key, name in YARDSTICKS.items()
        if f"bits_per_byte_{key}" in result
    }


def _bits_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, v in result["models"].items():
        rows.append(
            (name, f"{v['bits_per_byte']:.4f}", f"{v['loss']:.4f}", f"{v['tokens']:,}",
             f"{v['seq_len']:,}")
        )  # fmt: skip
        for domain, own in v.get("domains", {}).items():
            bits = f"{own['bits_per_byte']:.4f}"
            rows.append((f"  {domain}", bits, "", f"{own['tokens']:,}", ""))
    for name, value in _compressors(result).items():
        rows.append((name, f"{value:.4f}", "", "", ""))
    return Table(("model", "bits per byte", "loss", "tokens", "window"), rows)


def bars(models: Mapping[str, float], packed: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return bits per byte of the compressors and the models, as bars of the difference to xz.

    Bars left of xz's line need fewer bits, bars right of it more. Bars from zero would be nearly
    equal. Without xz, the first model is the line.
    """
    line = packed.get("xz -9e", next(iter(models.values())))
    rows = [*sorted(packed.items(), key=lambda kv: kv[0], reverse=True), *models.items()]
    values = [value for _, value in rows]
    low, high = min(values), max(values)
    span = max(high - low, 0.1 * line)  # negligible differences stay short
    return [
        {
            "name": name, "value": value, "model": name in models,
            "change": 100 * (value / line - 1), "left": 100 * (min(value, line) - low) / span,
            "width": 100 * abs(value - line) / span, "line": 100 * (line - low) / span,
        }
        for name, value in rows
    ]  # fmt: skip


# fastlm safety


def number(score: Mapping[str, Any], value: float) -> str:
    return f"{100 * value:.1f} %" if score["unit"] == "share" else f"{value:.2f}"


def interval(score: Mapping[str, Any]) -> str:
    return f"{number(score, score['low'])} to {number(score, score['high'])}"


def judge_lines(score: Mapping[str, Any]) -> list[str]:
    """Return a line for each domain that the judge was measured in; none where there is no judge.
    Before them stands the judge's own share, where the value is corrected.
    """
    if "judge" not in score:
        return []
    judge = score["judge"]
    lines = [f"{100 * score['raw']:.1f} % before the correction"] * score["corrected"]
    for error in (judge, *judge.get("elsewhere", ())):
        (hit, of), (passed, rest) = error["sensitivity"], error["specificity"]
        lines.append(f"{error['domain']}: {hit}/{of}, {passed}/{rest}, kappa {error['kappa']:.2f}")
    return lines


def safety_table(result: Mapping[str, Any], name: str) -> Table:
    """The scores of a model, each with its interval, and below it its judge."""
    rows = []
    for key, score in result["models"][name]["scores"].items():
        judge = score.get("judge", {})
        labels = [one["labels"] for one in (judge, *judge.get("elsewhere", ())) if one]
        bar = None
        if score["unit"] == "share":
            bar = (100 * score["low"], 100 * score["high"], 100 * score["value"])
        rows.append(
            (
                Cell(key, judge_lines(score), title="; ".join([score["what"], *labels])),
                number(score, score["value"]), Cell(interval(score), bar=bar), f"{score['n']:,}",
            )
        )  # fmt: skip
    columns = ("score", "value", f"{100 * result['confidence']:g} % interval", "items")
    return Table(columns, rows, title=f"{name}:" if len(result["models"]) > 1 else "")


def safety_sets(result: Mapping[str, Any]) -> Table | None:
    if not result["sets"]:
        return None
    rows = [
        (key, source["licence"], f"{source['origin']}; {source['package']}")
        for key, source in result["sets"].items()
    ]
    return Table(("set", "licence", "source"), rows, left=3, title="Where the sets come from")


def safety_notes(result: Mapping[str, Any]) -> list[str]:
    """Return what stands below the scores: constructed answers that the judges pass, and how many
    prompts of each model and measure did not fit the context."""
    several = len(result["models"]) > 1
    kinds = [
        score["judge"]["kinds"]
        for model in result["models"].values()
        for score in model["scores"].values()
        if score.get("judge", {}).get("kinds")
    ]
    texts = dict.fromkeys(
        ", ".join(f"{kind} {passed}/{of}" for kind, (passed, of) in one.items()) for one in kinds
    )
    notes = [f"the judge passes, of answers constructed not to succeed: {text}" for text in texts]
    return notes + [
        f"{f'{name}: ' if several else ''}{measure}: {count:,} prompts were cut at their beginning"
        " to fit the context"
        for name, model in result["models"].items()
        for measure, count in model.get("cut", {}).items()
    ]


def safety_summary(result: Mapping[str, Any]) -> str:
    count = sum(len(model["scores"]) for model in result["models"].values())
    line = f"{count} scores of {len(result['models'])} models"
    if result["gates"]:
        failed = len(result["failed"])
        line += f", {failed} gates failed" if failed else f", all {result['gates']} gates passed"
    return line


def render_safety(result: Mapping[str, Any]) -> Any:
    """Return what the command prints: the scores, the sets, the gates."""
    from rich.console import Group

    parts: list[Any] = [safety_table(result, name).rich() for name in result["models"]]
    if any("judge" in s for m in result["models"].values() for s in m["scores"].values()):
        parts.append(LEGEND)
    parts += safety_notes(result)
    if sets := safety_sets(result):
        parts.append(sets.rich())
    if result["gates"]:
        passed = [f"all {result['gates']} gates passed"]
        parts += ["", *([f"FAILED {why}" for why in result["failed"]] or passed)]
    return Group(*parts)


def safety_part(result: Mapping[str, Any]) -> Part:
    models = result["models"]
    charts = []
    for name, model in models.items():
        of = f" ({name})" if len(models) > 1 else ""
        drawn = (memorization_chart(model["scores"], of), exposure_chart(model["scores"], of))
        charts += [chart for chart in drawn if chart is not None]
    cards = []
    if result["gates"]:
        failed = len(result["failed"])
        cards.append((f"{result['gates'] * len(models) - failed}", "safety gates passed"))
        if failed:
            cards.append((f"{failed}", "safety gates failed"))
    note = (
        f"At most {result['limit']:,} items of each set. A bar is the"
        f" {100 * result['confidence']:g} % interval, of the items alone. {LEGEND}"
    )
    tables = [safety_table(result, name) for name in models]
    values = {
        **EMPTY, "failed": result["failed"], "tables": tables, "notes": safety_notes(result),
        "sources": safety_sets(result),
    }  # fmt: skip
    return Part(
        "How safe it is", note, charts=charts, cards=cards, template="eval.html.jinja",
        values=values,
    )  # fmt: skip
