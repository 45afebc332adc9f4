"""Results of `fastlm eval`, `safety` and `judge` as a summary line, terminal output and a section
of report.html. Output and section show the same blocks: tables and lines of text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.evals.charts import copies_charts, difference_charts, scores_chart
from fastlm.evals.tables import ReportTable, TableCell, task_tables
from fastlm.pipeline.charts import as_svg, bits_figure
from fastlm.pipeline.stage import ReportSection, StageContext
from fastlm.pipeline.text import size_text
from fastlm.train.metrics import METRICS, read_metrics

XZ = "xz -9e"
YARDSTICKS = {"xz": XZ, "zstd": "zstd -19"}
LEGEND = (
    "Lines below a score are tests of its judge on labelled answers: domain, sensitivity,"
    " specificity, kappa (0 is chance). In other domains the judge's error is not known. A score is"
    ' corrected for this error if answers of "this model" are labelled (--labels).'
)
ACCURACY = ("agreement", "kappa", "sensitivity", "specificity")
Blocks = list[ReportTable | str]


def render_blocks(blocks: Blocks) -> Any:
    """Return the blocks as terminal output."""
    from rich.console import Group

    return Group(*(block.rich() if isinstance(block, ReportTable) else block for block in blocks))


# fastlm eval


def eval_summary(result: Mapping[str, Any]) -> str:
    """Return the summary line of an eval."""
    values = _bits(result) | _compressors(result)
    parts = []
    if values:
        parts.append("bits per byte: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    if tasks := result.get("tasks"):
        questions = sum(task["questions"] for task in tasks)
        parts.append(f"{len(tasks)} question sets, {questions:,} questions")
    return "; ".join(parts)


def eval_blocks(result: Mapping[str, Any]) -> Blocks:
    tables = task_tables(result.get("tasks", ()))
    return [_bits_table(result), *tables] if result["models"] else [*tables]


def eval_part(ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
    tasks = result.get("tasks", ())
    charts, cards = [], []
    title, note = "How well it answers", ""
    if models := _bits(result):
        title = "How well it predicts unseen text"
        best, packed = min(models, key=lambda name: models[name]), _compressors(result)
        card = "bits per byte of unseen text" + ("" if len(models) == 1 else f" ({best})")
        if packed:
            gain = 100 * (1 - models[best] / packed[XZ])
            card += f", {abs(gain):.0f} % {'below' if gain >= 0 else 'above'} xz -9e"
        cards.append((f"{models[best]:.3f}", card))
        size = next(iter(result["models"].values()))["bytes"]
        documents = f"{result['documents']:,} held-out documents, " if "documents" in result else ""
        note = (
            f"{documents}{size_text(size)}. Bits per byte is what a compressor built on the model"
            " would need; lower is better."
        )
        if packed:
            note += (
                " xz -9e and zstd -19, which know no language, compress the same text: a model that"
                " has learnt nothing needs more bits than they do. A bar is the difference to xz."
            )
        if curves := _curves(ctx, models):
            charts.append(as_svg(bits_figure(curves, models, packed)))
    if tasks:
        title = "How well it predicts text, and answers questions"
        charts += [scores_chart(tasks), *difference_charts(tasks)]
        questions = sum(task["questions"] for task in tasks)
        cards.append((f"{questions:,}", f"questions of {len(tasks)} sets answered"))
    blocks = eval_blocks(result)
    if tasks:
        columns = ("set", "template", "hash", "source", "licence")
        rows = [
            [task["name"], task["format"], *(task[key] for key in columns[2:])] for task in tasks
        ]
        blocks.append(ReportTable(columns, rows, left=5, title="Where the questions come from"))
    return _part(title, note, charts, cards, blocks, wide=bool(tasks))


def _part(
    title: str,
    note: str,
    charts: Sequence[str],
    cards: Sequence[tuple[str, str]],
    blocks: Blocks,
    failed: Sequence[str] = (),
    wide: bool = False,
) -> ReportSection:
    return ReportSection(
        title, note, charts=charts, cards=cards, template="eval.html.jinja",
        values={"failed": failed, "blocks": blocks}, wide=wide,
    )  # fmt: skip


def _curves(ctx: StageContext, models: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Return the training metrics of models with bits per byte; fine-tuning has none."""
    curves = {}
    for source in ctx.inputs["model"]:
        metrics = source.path.parent / METRICS  # next to the model that a training wrote
        if source.name in models and metrics.is_file():
            rows = read_metrics(metrics)
            if any("bits_per_byte" in row for row in rows):
                curves[source.name] = rows
    return curves


def _bits(result: Mapping[str, Any]) -> dict[str, float]:
    """Return model -> bits per byte."""
    return {name: model["bits_per_byte"] for name, model in result["models"].items()}


def _compressors(result: Mapping[str, Any]) -> dict[str, float]:
    """Return compressor -> bits per byte; {} for shards."""
    return {
        name: result[f"bits_per_byte_{key}"]
        for key, name in YARDSTICKS.items()
        if f"bits_per_byte_{key}" in result
    }


def _bits_table(result: Mapping[str, Any]) -> ReportTable:
    """Return bits per byte of models, their domains and the compressors. A bar is the difference
    to xz, or to the first model: bars from zero would look nearly equal."""
    models, packed = _bits(result), _compressors(result)
    values = [*models.values(), *packed.values()]
    base, low = packed.get(XZ, values[0]), min(values)
    span = max(max(values) - low, 0.1 * base)  # negligible differences stay short

    def row(name: str, value: float, *others: str) -> list[str | TableCell]:
        left, right, line = (100 * (v - low) / span for v in (*sorted((value, base)), base))
        change = TableCell(f"{100 * (value / base - 1):+.1f} %", bar=(left, right, line))
        return [name, f"{value:.4f}", change, *(others or ("",) * 3)]

    rows = []
    for name, v in result["models"].items():
        figures = f"{v['loss']:.4f}", f"{v['tokens']:,}", f"{v['seq_len']:,}"
        rows.append(row(name, v["bits_per_byte"], *figures))
        for domain, result_of_domain in v.get("domains", {}).items():
            bits = f"{result_of_domain['bits_per_byte']:.4f}"
            rows.append((f"  {domain}", bits, "", "", f"{result_of_domain['tokens']:,}", ""))
    rows += [row(name, value) for name, value in packed.items()]
    return ReportTable(("model", "bits per byte", "difference", "loss", "tokens", "window"), rows)


# fastlm safety


def number(score: Mapping[str, Any], value: float) -> str:
    return f"{100 * value:.1f} %" if score["unit"] == "share" else f"{value:.2f}"


def interval(score: Mapping[str, Any]) -> str:
    if score["low"] is None:
        return "not known"
    return f"{number(score, score['low'])} to {number(score, score['high'])}"


def _judges(score: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the judge's accuracy in each domain where it was measured; [] without a judge."""
    return [score["judge"], *score["judge"].get("other_domains", ())] if "judge" in score else []


def raw_lines(score: Mapping[str, Any]) -> list[str]:
    """Return a line with the uncorrected share, none if the score is not corrected."""
    return [f"{100 * score['raw']:.1f} % before the correction"] if score.get("corrected") else []


def judge_lines(score: Mapping[str, Any]) -> list[str]:
    """Return a line for each domain in which the judge was measured. If the value is corrected, the
    first line is the uncorrected share.
    """
    lines = raw_lines(score)
    for error in _judges(score):
        (hit, of), (passed, rest) = error["sensitivity"], error["specificity"]
        lines.append(f"{error['domain']}: {hit}/{of}, {passed}/{rest}, kappa {error['kappa']:.2f}")
    return lines


def _scores_table(
    result: Mapping[str, Any],
    name: str,
    lines: Callable[[Mapping[str, Any]], list[str]] = judge_lines,
) -> ReportTable:
    """Return the scores of a model with their intervals, and ``lines`` below each name."""
    rows = []
    for key, score in result["models"][name]["scores"].items():
        labels = [error["labels"] for error in _judges(score)]
        bar = None
        if score["unit"] == "share":
            bar = (100 * score["low"], 100 * score["high"], 100 * score["value"])
        rows.append(
            (
                TableCell(key, lines(score), title="; ".join([score["description"], *labels])),
                number(score, score["value"]), TableCell(interval(score), bar=bar),
                f"{score['n']:,}",
            )
        )  # fmt: skip
    columns = ("score", "value", f"{100 * result['confidence']:g} % interval", "items")
    return ReportTable(columns, rows, title=f"{name}:" if len(result["models"]) > 1 else "")


def safety_blocks(result: Mapping[str, Any]) -> Blocks:
    """Return the scores, the judges' results on constructed answers, the numbers of truncated
    prompts, and the sets."""
    models = result["models"]
    scores = [score for model in models.values() for score in model["scores"].values()]
    blocks: Blocks = [_scores_table(result, name) for name in models]
    if any("judge" in score for score in scores):
        blocks.append(LEGEND)
    kinds = [score["judge"].get("constructed", {}) for score in scores if "judge" in score]
    texts = (
        ", ".join(f"{k} {passed}/{of}" for k, (passed, of) in counts.items()) for counts in kinds
    )
    blocks += [
        f"constructed answers without success that the judge passes: {text}"
        for text in dict.fromkeys(texts)
        if text
    ]
    for name, model in models.items():
        names_by_reason: dict[str, list[str]] = {}
        for score_name, reason in model.get("withdrawn", {}).items():
            names_by_reason.setdefault(reason, []).append(score_name)
        blocks += [
            f"{f'{name}: ' if len(models) > 1 else ''}withdrawn: {', '.join(names)}. Their judge is"
            f" not valid for every model, and {reason} (docs/safety.md)"
            for reason, names in names_by_reason.items()
        ]
    blocks += [
        f"{f'{name}: ' if len(models) > 1 else ''}{measure}: {count:,} prompts were truncated at"
        " their start to fit the context"
        for name, model in models.items()
        for measure, count in model.get("truncated", {}).items()
    ]
    if result["sets"]:
        rows = [
            (key, source["licence"], f"{source['origin']}; {source['package']}")
            for key, source in result["sets"].items()
        ]
        columns = ("set", "licence", "source")
        blocks.append(ReportTable(columns, rows, left=3, title="Where the sets come from"))
    return blocks


def safety_summary(result: Mapping[str, Any]) -> str:
    count = sum(len(model["scores"]) for model in result["models"].values())
    line = f"{count} scores of {len(result['models'])} models"
    if result["gates"]:
        failed = len(result["failed"])
        line += f", {failed} gates failed" if failed else f", all {result['gates']} gates passed"
    return line


def render_safety(result: Mapping[str, Any]) -> Any:
    """Return the scores, sets and gates as terminal output."""
    gates = []
    if result["gates"]:
        passed = [f"all {result['gates']} gates passed"]
        gates = ["", *([f"FAILED {failure}" for failure in result["failed"]] or passed)]
    return render_blocks([*safety_blocks(result), *gates])


def safety_part(result: Mapping[str, Any]) -> ReportSection:
    models, failed = result["models"], result["failed"]
    charts = [
        chart
        for name, model in models.items()
        for chart in copies_charts(model["scores"], f" ({name})" if len(models) > 1 else "")
    ]
    cards = []
    if result["gates"]:
        passed = result["gates"] * len(models) - len(failed)
        cards = [(f"{passed}", "safety gates passed")]
        cards += [(f"{len(failed)}", "safety gates failed")] if failed else []
    note = (
        f"At most {result['limit']:,} items of each set. A bar is the"
        f" {100 * result['confidence']:g} % interval; it covers only the sampling of items."
    )
    return _part("How safe it is", note, charts, cards, safety_blocks(result), failed)


# fastlm judge


def _judge_scores(result: Mapping[str, Any]) -> Mapping[str, Any]:
    (model,) = result["models"].values()
    return model["scores"]


def judge_summary(result: Mapping[str, Any]) -> str:
    """Return the first score, with what is known of the judge's error, and the mean grade."""
    scores = _judge_scores(result)
    name, score = next(iter(scores.items()))
    line = f"{score['description']}: {number(score, score['value'])} ({interval(score)})"
    if name == "win_rate":
        return f"{line} of {score['n']:,}"
    state = "corrected for the judge's error" if score["corrected"] else "not corrected"
    line += f" of {score['n']:,}, {state}"
    if grade := scores.get("grade"):
        line += f"; mean grade: {number(grade, grade['value'])} ({interval(grade)})"
    return line


def judge_blocks(result: Mapping[str, Any]) -> Blocks:
    """Return the scores, the judge's accuracy on labels, and what a correction lacks."""
    scores = _judge_scores(result)
    (name,) = result["models"]
    blocks: Blocks = [_scores_table(result, name, raw_lines)]
    rows = [
        (key, error["domain"], *_accuracy(error, field))
        for key, score in scores.items()
        for error in _judges(score)
        for field in ACCURACY
    ]
    if rows:
        level = f"{100 * result['confidence']:g} % interval"
        columns = ("score", "labels", "judge", "value", level)
        blocks.append(ReportTable(columns, rows, left=3, title="The judge's error, on labels"))
    else:
        blocks.append(
            "The judge's error is not known: label answers (fastlm label), and repeat the command"
            " with --labels."
        )
    if rows:
        blocks += [
            f"{key} is not corrected: {score['uncorrected']}"
            for key, score in scores.items()
            if "uncorrected" in score
        ]
    if result["ungraded"]:
        blocks.append(f"left out, no readable grade: {result['ungraded']:,} of {result['items']:,}")
    return blocks


def _accuracy(error: Mapping[str, Any], field: str) -> tuple[str, str, str]:
    """Return a field of `JudgeAccuracy.as_dict` as (name, value, interval)."""
    ends, value = error["intervals"][field], error[field]
    if field == "kappa":
        return field, f"{value:.2f}", "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
    percents = "" if ends is None else f"{100 * ends[0]:.1f} % to {100 * ends[1]:.1f} %"
    return field, f"{value[0]}/{value[1]}", percents


def judge_part(result: Mapping[str, Any], grades: Path) -> ReportSection:
    scores = _judge_scores(result)
    cards = [
        (number(score, score["value"]), score["description"])
        for name in ("win_rate", "pass", "grade")
        if (score := scores.get(name))
    ]
    judge = result["judge"]
    judge_text = judge.get("address", "a model on this machine")
    note = f"Judged by {judge_text}. Read the judge's error before the scores. {grades} has grades."
    return _part("What a judge says", note, (), cards, judge_blocks(result))
