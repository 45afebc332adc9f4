"""A table described once, for the terminal (rich) and report.html; and the tables of question
sets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlm.evals.measures import HEADLINE

Tasks = Sequence[Mapping[str, Any]]
CHOICES = ("acc", "acc_olmes", "acc_norm", "acc_bytes")
HEADINGS = {
    "set": "set", "model": "model", "questions": "n", HEADLINE: "bits/byte", "acc": "accuracy",
    "acc_olmes": "OLMES", "acc_norm": "lm-eval", "chance": "chance", "detects": "detects",
}  # fmt: skip
MAX_PARTS = 30  # of a set in its table; scores.json has all


@dataclass(frozen=True)
class Cell:
    """``lines`` stand below the text. ``bar``: of an interval, its ends and the value in percent;
    drawn in report.html in place of the text, which also has ``title`` for the pointer."""

    text: str
    lines: Sequence[str] = ()
    title: str = ""
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of texts or cells; the first ``left`` columns are words, the others figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    left: int = 1
    title: str = ""
    note: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

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
    """Return the names of models without the folders that they have in common: the last words of
    each path, as many as tell them apart."""
    for count in range(1, max(name.count("/") for name in names) + 2):
        short = {name: "/".join(name.rstrip("/").split("/")[-count:]) for name in names}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


def is_share(name: str, measure: Mapping[str, Any]) -> bool:
    return name != HEADLINE and measure.get("unit") != ""


def figure(measure: Mapping[str, Any] | None, name: str = "acc") -> str:
    """A value with its standard error: a share in percent."""
    if measure is None:
        return ""
    scale, digits = (100, 1) if is_share(name, measure) else (1, 3)
    value, error = scale * measure["value"], measure["error"]
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text}±{scale * error:.{digits}f}"


def main_measure(measures: Mapping[str, Any]) -> str:
    """The measure that "accuracy" shows: exact match, accuracy or else the first."""
    names = [name for name in ("exact_match", "acc", *measures) if name in measures]
    return next((name for name in names if name != HEADLINE), "acc")


def accuracy(measures: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return measures.get("acc_olmes") or measures.get(main_measure(measures))


def lines(tasks: Tasks) -> Iterator[dict[str, str]]:
    """Yield a line per task and model: what each of `HEADINGS` shows.

    Accuracies are percent. Of answers in the model's own words, "accuracy" is the share that is
    right, and the task says by which measure.
    """
    for task in tasks:
        short = short_names(list(task["models"]))
        for name, model in task["models"].items():
            measures = model["measures"]
            main = main_measure(measures)
            by = "" if main in ("acc", "exact_match") else f" ({main})"
            best = accuracy(measures)
            yield {
                "set": task["name"] + by,
                "model": short[name],
                "questions": f"{task['questions']:,}",
                HEADLINE: figure(measures.get(HEADLINE), HEADLINE),
                "acc": figure(measures.get(main)),
                "acc_olmes": figure(measures.get("acc_olmes")),
                "acc_norm": figure(measures.get("acc_norm")),
                "chance": _percent(task["chance"]),
                "detects": _percent(best["detects"] if best and is_share(main, best) else None),
            }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def task_tables(tasks: Tasks) -> list[Table]:
    """The tables of question sets that have a row."""
    if not tasks:
        return []
    makers = (task_table, _part_table, _contamination_table, compared_table)
    return [table for table in (make(tasks) for make in makers) if table.rows]


def task_table(tasks: Tasks) -> Table:
    """All tasks. Shares are percent, with their standard errors."""
    rows = list(lines(tasks))
    several = len({row["model"] for row in rows}) > 1
    keys = [key for key in HEADINGS if (several or key != "model") and any(r[key] for r in rows)]
    return Table(
        [HEADINGS[key] for key in keys],
        [[row[key] for key in keys] for row in rows],
        left=sum(key in ("set", "model") for key in keys), title="Question sets",
        note="Bits per byte of the right answer: lower is better. Accuracies in percent with"
        " standard errors: the likeliest answer is right; the same after OLMES' normalisation; the"
        ' same by characters, as in lm-evaluation-harness. Chance is what guessing gives. "Detects"'
        " is the minimum detectable effect: the smallest difference to another model that these"
        " questions find with a probability of 80 %.",
    )  # fmt: skip


def comparisons(tasks: Tasks) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each task with a comparison by one of the measures that tables show."""
    for task in tasks:
        for one in task["compared"]:
            if one["measure"] == "acc_olmes" or one["measure"] not in CHOICES:
                yield task, one


def difference(one: Mapping[str, Any]) -> tuple[str, str]:
    """A difference and its interval."""
    scale, digits = (100, 1) if is_share(one["measure"], one) else (1, 4)
    texts = [
        "" if one[key] is None else f"{scale * one[key]:+.{digits}f}"
        for key in ("difference", "low", "high")
    ]
    return texts[0], f"{texts[1]}..{texts[2]}"


def compared_table(tasks: Tasks) -> Table:
    """The models after the first, each minus the first."""
    first, *others = short_names(list(tasks[0]["models"])).values()
    rows = []
    for task, one in comparisons(tasks):
        measure = str(one["measure"])
        by = {HEADLINE: "bits/byte", "acc_olmes": "OLMES"}.get(measure, measure)
        rows.append(
            (
                task["name"], short_names(list(task["models"]))[one["model"]], by.replace("_", " "),
                *difference(one), p_value(one["p"]), p_value(one["p_adjusted"]),
                "" if one["needed"] is None else f"{one['needed']:,}",
            )
        )  # fmt: skip
    return Table(
        ("set", "model", "by", "difference", "95 %", "p", "p of all", "n needed"), rows, left=3,
        title=f"{others[0] if len(others) == 1 else 'each model'} minus {first}",
        note="On the same questions: fewer bits and more right answers are better. Accuracies in"
        ' percentage points. "p of all" is adjusted for the number of sets (Holm); "n needed" is'
        " how many questions would show such a difference.",
    )  # fmt: skip


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _part_table(tasks: Tasks) -> Table:
    """The parts of sets, such as the fields of MMLU; of a set whose parts belong to wider ones,
    only these."""
    rows = []
    for task in tasks:
        short = short_names(list(task["models"]))
        for name, model in task["models"].items():
            parts = model.get("parts", {})
            for part in task.get("wider") or list(parts)[:MAX_PARTS]:
                if part in parts:
                    measures = parts[part]["measures"]
                    rows.append(
                        (
                            task["name"], part, short[name], f"{parts[part]['questions']:,}",
                            figure(measures.get(HEADLINE), HEADLINE), figure(accuracy(measures)),
                        )
                    )  # fmt: skip
    columns = ("set", "part", "model", "n", "bits/byte", "accuracy")
    return Table(columns, rows, left=3, title="Parts of the sets")


def _contamination_table(tasks: Tasks) -> Table:
    """Touched and dirty questions, and the accuracy (else bits per byte) of clean and dirty
    ones."""
    rows = []
    for task in tasks:
        if not (found := task.get("contamination")):
            continue
        short = short_names(list(task["models"]))
        for name, parts in found["models"].items():
            scores = []
            for part in ("clean", "dirty"):
                own = parts.get(part, {})
                scores.append(figure(accuracy(own)) or figure(own.get(HEADLINE), HEADLINE))
            counts = (f"{found[key]:,}" for key in ("questions", "touched", "dirty"))
            rows.append((task["name"], short[name], *counts, *scores))
    return Table(
        ("set", "model", "n", "touched", "dirty", "clean score", "dirty score"), rows, left=2,
        title="Are the questions in the training text?",
        note="Touched: 40 letters in a row of the question and its right answer stand there. Dirty:"
        " such runs cover 80 % of its letters.",
    )  # fmt: skip
