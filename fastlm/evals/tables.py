"""The scores of tasks as tables: for a terminal, for LaTeX, and as rows for report.html."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastlm.evals.measures import HEADLINE

Tasks = Sequence[Mapping[str, Any]]
CHOICES = ("acc", "acc_olmes", "acc_norm", "acc_bytes")
HEADINGS = {
    "set": "set", "model": "model", "questions": "n", HEADLINE: "bits/byte", "acc": "accuracy",
    "acc_olmes": "OLMES", "acc_norm": "lm-eval", "chance": "chance", "detects": "detects",
}  # fmt: skip


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of models without the folders that they have in common: the last words of each path,
    as many as tell them apart."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    for count in range(1, max(map(len, parts.values()), default=1) + 1):
        short = {name: "/".join(words[-count:]) for name, words in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


def figure(measure: Mapping[str, Any] | None, share: bool) -> str:
    """A value with its standard error: a share in percent."""
    if measure is None:
        return ""
    scale, digits = (100, 1) if share else (1, 3)
    value, error = scale * measure["value"], measure["error"]
    told = f"{value:.{digits}f}"
    return told if error is None else f"{told}±{scale * error:.{digits}f}"


def written_measure(measures: Mapping[str, Any]) -> str:
    """The measure of answers in the model's own words: exact match or else the first; "acc" where
    answers were given."""
    found = [name for name in measures if name not in (HEADLINE, *CHOICES)]
    return "exact_match" if "exact_match" in found else next(iter(found), "acc")


def lines(tasks: Tasks) -> Iterator[dict[str, str]]:
    """Yield a line per task and model: what each of `HEADINGS` shows.

    Accuracies are percent. Of answers in the model's own words, "accuracy" is the share that is
    right, and the task says by which measure.
    """
    for task in tasks:
        short = short_names(list(task["models"]))
        for name, model in task["models"].items():
            measures = model["measures"]
            written = written_measure(measures)
            told = "" if written in ("acc", "exact_match") else f" ({written})"
            accuracy = measures.get("acc_olmes") or measures.get(written)
            yield {
                "set": task["name"] + told,
                "model": short[name],
                "questions": f"{task['questions']:,}",
                HEADLINE: figure(measures.get(HEADLINE), share=False),
                "acc": figure(measures.get(written), share=True),
                "acc_olmes": figure(measures.get("acc_olmes"), share=True),
                "acc_norm": figure(measures.get("acc_norm"), share=True),
                "chance": _percent(task["chance"]),
                "detects": _percent(accuracy and accuracy["detects"]),
            }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def shown_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    several = len({row["model"] for row in rows}) > 1
    return [key for key in HEADINGS if (several or key != "model") and any(r[key] for r in rows)]


def task_table(tasks: Tasks) -> Any:
    """A rich table of all tasks. Shares are percent, with their standard errors."""
    from rich.table import Table

    rows = list(lines(tasks))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    columns = shown_columns(rows)
    for key in columns:
        left = key in ("set", "model")
        table.add_column(HEADINGS[key], justify="left" if left else "right")
    for row in rows:
        table.add_row(*(row[key] for key in columns))
    return table


def comparisons(tasks: Tasks) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each task with a comparison by one of the measures that tables show."""
    for task in tasks:
        for one in task["compared"]:
            if one["measure"] == "acc_olmes" or one["measure"] not in CHOICES:
                yield task, one


def difference(one: Mapping[str, Any]) -> tuple[str, str]:
    """A difference and its interval."""
    share = one["measure"] != HEADLINE
    scale, digits = (100, 1) if share else (1, 4)
    told = [
        "" if one[key] is None else f"{scale * one[key]:+.{digits}f}"
        for key in ("difference", "low", "high")
    ]
    return told[0], f"{told[1]}..{told[2]}"


COMPARED = ("set", "model", "by", "difference", "95 %", "p", "p of all", "n needed")


def compared_lines(tasks: Tasks) -> Iterator[tuple[str, ...]]:
    """Yield what each column of `COMPARED` shows: a model minus the first. "p of all" is adjusted
    for the number of sets; "n needed" are the questions that would show such a difference."""
    for task, one in comparisons(tasks):
        measure = str(one["measure"])
        by = {HEADLINE: "bits/byte", "acc_olmes": "OLMES"}.get(measure, measure)
        yield (
            task["name"], short_names(list(task["models"]))[one["model"]], by.replace("_", " "),
            *difference(one), p_value(one["p"]), p_value(one["p_adjusted"]),
            "" if one["needed"] is None else f"{one['needed']:,}",
        )  # fmt: skip


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def compared_table(tasks: Tasks) -> Any:
    """A rich table of the models after the first, each minus the first."""
    from rich.table import Table

    first, *others = short_names(list(tasks[0]["models"])).values()
    what = others[0] if len(others) == 1 else "each model"
    table = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, title=f"\n{what} minus {first}",
        title_justify="left",
    )  # fmt: skip
    shown = [i for i, name in enumerate(COMPARED) if name != "model" or len(others) > 1]
    for i in shown:
        table.add_column(COMPARED[i], justify="left" if i < 3 else "right")
    for line in compared_lines(tasks):
        table.add_row(*(line[i] for i in shown))
    return table


_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"±": "$\\pm$", "~": "\\~{}"})


def latex(tasks: Tasks) -> str:
    """A LaTeX table (booktabs) of all tasks."""
    rows = list(lines(tasks))
    columns = shown_columns(rows)
    body = [" & ".join(row[key].translate(_LATEX) for key in columns) + r" \\" for row in rows]
    align = "".join("l" if key in ("set", "model") else "r" for key in columns)
    head = " & ".join(HEADINGS[key].translate(_LATEX) for key in columns) + r" \\"
    return "\n".join(
        [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
         r"\end{tabular}", ""]
    )  # fmt: skip
