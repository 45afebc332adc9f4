"""Tables for both the terminal (rich) and report.html, and the tables of question sets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlm.evals.task_metrics import HEADLINE

Tasks = Sequence[Mapping[str, Any]]
CHOICE_METRICS = ("acc", "acc_olmes", "acc_norm", "acc_bytes")
TEXT_COLUMNS = ("set", "part", "model", "by")  # the others are figures
MAX_PARTS = 30  # parts of a set in its table; scores.json has all


@dataclass(frozen=True)
class TableCell:
    """A cell with its ``text``.

    lines: shown below the text.
    bar: the ends of an interval and the value, in percent; report.html draws it instead of the
        text.
    title: what report.html shows under the pointer.
    """

    text: str
    lines: Sequence[str] = ()
    title: str = ""
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class ReportTable:
    """Rows of texts or cells. The first ``left`` columns are aligned to the left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | TableCell]]
    left: int = 1
    title: str = ""
    note: str = ""

    @property
    def cells(self) -> list[list[TableCell]]:
        return [[c if isinstance(c, TableCell) else TableCell(c) for c in row] for row in self.rows]

    def rich(self) -> Any:
        from rich.table import Table as RichTable

        table = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
        table.title = f"\n{self.title}" if self.title else None
        for i, column in enumerate(self.columns):
            is_left = i < self.left
            table.add_column(column, justify="left" if is_left else "right", no_wrap=not is_left)
        for row in self.cells:
            table.add_row(*("\n  ".join([cell.text, *cell.lines]) for cell in row))
        return table


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten the names of models: keep as many of the last path components as make them
    different."""
    for count in range(1, max(name.count("/") for name in names) + 2):
        short = {name: "/".join(name.rstrip("/").split("/")[-count:]) for name in names}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


def is_share(name: str, metric: Mapping[str, Any]) -> bool:
    return name != HEADLINE and metric.get("unit") != ""


def format_score(metric: Mapping[str, Any] | None, name: str = "acc") -> str:
    """Return a value with its standard error; shares are in percent."""
    if metric is None:
        return ""
    scale, digits = (100, 1) if is_share(name, metric) else (1, 3)
    value, error = scale * metric["value"], metric["error"]
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text}±{scale * error:.{digits}f}"


def main_metric(metrics: Mapping[str, Any]) -> str:
    """Return the metric for column "accuracy": exact match, accuracy or else the first."""
    names = [name for name in ("exact_match", "acc", *metrics) if name in metrics]
    return next((name for name in names if name != HEADLINE), "acc")


def accuracy(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return metrics.get("acc_olmes") or metrics.get(main_metric(metrics))


def task_tables(tasks: Tasks) -> list[ReportTable]:
    """Return the tables of question sets that have rows."""
    if not tasks:
        return []
    short = short_names(list(tasks[0]["models"]))
    first, *others = short.values()
    tables = (
        _table(
            score_rows(tasks), "Question sets",
            "Bits per byte of the right answer: lower is better. Accuracies are in percent with"
            " standard errors: of the likeliest answer; after OLMES' normalisation (OLMES); per"
            " character (lm-eval: as in lm-evaluation-harness). Chance is guessing's accuracy."
            " MDE is the minimum detectable effect at 80 % power, in percentage points.",
        ),
        _table(_part_rows(tasks, short), "Parts of the sets"),
        _table(
            _contamination_rows(tasks, short), "Are the questions in the training text?",
            "Touched: the training text contains 40 letters in a row of the question and its right"
            " answer. Dirty: such runs cover 80 % of its letters. Score to 20 %: of the"
            " questions of which they cover at most 20 %.",
        ),
        _table(
            _comparison_rows(tasks, short),
            f"{others[0] if len(others) == 1 else 'each model'} minus {first}",
            "On the same questions. Fewer bits and more right answers are better. Accuracies are in"
            ' percentage points. "p of all" is adjusted for the number of sets (Holm). "n needed":'
            " the number of questions that would detect such a difference.",
        ),
    )  # fmt: skip
    return [table for table in tables if table.rows]


def _table(rows: Iterable[Mapping[str, str]], title: str, note: str = "") -> ReportTable:
    """Return a table of rows by column, without empty columns."""
    rows = [*rows]
    columns = [key for key in rows[0] if any(row[key] for row in rows)] if rows else []
    left = sum(column in TEXT_COLUMNS for column in columns)
    return ReportTable(columns, [[row[key] for key in columns] for row in rows], left, title, note)


def score_rows(tasks: Tasks) -> Iterator[dict[str, str]]:
    """Yield a row per task and model, with the model's name if there are several.

    Accuracies are in percent. For free-form answers "accuracy" is the share that is right; the
    task's name then has the metric.
    """
    for task in tasks:
        short = short_names(list(task["models"]))
        for name, model in task["models"].items():
            metrics = model["metrics"]
            main, best = main_metric(metrics), accuracy(metrics)
            by = "" if main in ("acc", "exact_match") else f" ({main})"
            yield {
                "set": task["name"] + by, "model": short[name] if len(short) > 1 else "",
                "n": f"{task['questions']:,}",
                "bits/byte": format_score(metrics.get(HEADLINE), HEADLINE),
                "accuracy": format_score(metrics.get(main)),
                "OLMES": format_score(metrics.get("acc_olmes")),
                "lm-eval": format_score(metrics.get("acc_norm")),
                "chance": _percent(task["chance"]),
                "MDE": _percent(
                    best["min_detectable_effect"] if best and is_share(main, best) else None
                ),
            }  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def table_comparisons(tasks: Tasks) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each task with each comparison by a metric that tables show."""
    for task in tasks:
        for comparison in task["comparisons"]:
            if comparison["metric"] == "acc_olmes" or comparison["metric"] not in CHOICE_METRICS:
                yield task, comparison


def _comparison_rows(tasks: Tasks, short: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the differences between each further model and the first."""
    for task, comparison in table_comparisons(tasks):
        metric = str(comparison["metric"])
        by = {HEADLINE: "bits/byte", "acc_olmes": "OLMES"}.get(metric, metric.replace("_", " "))
        scale, digits = (100, 1) if is_share(metric, comparison) else (1, 4)
        difference, low, high = (
            "" if comparison[key] is None else f"{scale * comparison[key]:+.{digits}f}"
            for key in ("difference", "low", "high")
        )
        p, p_of_all = (
            "<0.001" if comparison[key] < 0.001 else f"{comparison[key]:.3f}"
            for key in ("p", "p_adjusted")
        )
        yield {
            "set": task["name"], "model": short[comparison["model"]], "by": by,
            "difference": difference, "95 %": f"{low}..{high}", "p": p, "p of all": p_of_all,
            "n needed": "" if (n := comparison["items_needed"]) is None else f"{n:,}",
        }  # fmt: skip


def _part_rows(tasks: Tasks, short: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the parts of sets, such as subjects; if parts have groups, such as the fields of MMLU,
    only the groups."""
    for task in tasks:
        for name, model in task["models"].items():
            parts = model.get("parts", {})
            for part in task.get("part_groups") or list(parts)[:MAX_PARTS]:
                if part in parts:
                    metrics = parts[part]["metrics"]
                    yield {
                        "set": task["name"], "part": part, "model": short[name],
                        "n": f"{parts[part]['questions']:,}",
                        "bits/byte": format_score(metrics.get(HEADLINE), HEADLINE),
                        "accuracy": format_score(accuracy(metrics)),
                    }  # fmt: skip


def _contamination_rows(tasks: Tasks, short: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the counts of touched and dirty questions, and the accuracy (else bits per byte) on
    clean and dirty questions, and on those with at most some shares."""
    for task in tasks:
        contamination = task.get("contamination", {"models": {}})
        for name, parts in contamination["models"].items():
            clean, dirty = (parts.get(part, {}) for part in ("clean", "dirty"))
            yield {
                "set": task["name"], "model": short[name], "n": f"{contamination['questions']:,}",
                "touched": f"{contamination['touched']:,}", "dirty": f"{contamination['dirty']:,}",
                **{
                    f"score to {100 * entry['share']:g} %": _accuracy_or_bits(entry["metrics"])
                    for entry in parts["at_most"]
                },
                "clean score": _accuracy_or_bits(clean), "dirty score": _accuracy_or_bits(dirty),
            }  # fmt: skip


def _accuracy_or_bits(metrics: Mapping[str, Any]) -> str:
    return format_score(accuracy(metrics)) or format_score(metrics.get(HEADLINE), HEADLINE)
