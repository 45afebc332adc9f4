"""Tables of a set's parts, such as the fields of MMLU, and of its contamination."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastlm.evals.measures import HEADLINE
from fastlm.evals.tables import figure, short_names, written_measure

Tasks = Sequence[Mapping[str, Any]]
MOST = 30  # parts of a set that a terminal shows; scores.json has all


def part_lines(tasks: Tasks) -> Iterator[tuple[str, ...]]:
    """Yield set, part, model, questions, bits per byte, accuracy. Of a set whose parts belong to
    wider ones, only these."""
    for task in tasks:
        short = short_names(list(task["models"]))
        for name, model in task["models"].items():
            parts = model.get("parts", {})
            shown = task.get("wider") or list(parts)[:MOST]
            for part in shown:
                if part in parts:
                    measures = parts[part]["measures"]
                    accuracy = measures.get("acc_olmes") or measures.get(written_measure(measures))
                    yield (
                        task["name"], part, short[name], f"{parts[part]['questions']:,}",
                        figure(measures.get(HEADLINE), share=False), figure(accuracy, share=True),
                    )  # fmt: skip


PARTS = ("set", "part", "model", "n", "bits/byte", "accuracy")
CONTAMINATION = ("set", "model", "n", "touched", "dirty", "clean score", "dirty score")


def part_table(tasks: Tasks) -> Any:
    """A rich table of all parts; None where no set has any."""
    return _table(PARTS, part_lines(tasks), 3)


def contamination_lines(tasks: Tasks) -> Iterator[tuple[str, ...]]:
    """Yield set, model, touched and dirty questions, and the accuracy (else bits per byte) of clean
    and dirty ones."""
    for task in tasks:
        if not (found := task.get("contamination")):
            continue
        short = short_names(list(task["models"]))
        for name, parts in found["models"].items():
            told = []
            for part in ("clean", "dirty"):
                own = parts.get(part, {})
                accuracy = own.get("acc_olmes") or own.get(written_measure(own))
                told.append(figure(accuracy, share=True) or figure(own.get(HEADLINE), share=False))
            yield (
                task["name"], short[name], f"{found['questions']:,}", f"{found['touched']:,}",
                f"{found['dirty']:,}", *told,
            )  # fmt: skip


def contamination_table(tasks: Tasks) -> Any:
    """A rich table of what stands in the training data; None where nobody looked."""
    return _table(CONTAMINATION, contamination_lines(tasks), 2)


def _table(headings: Sequence[str], rows: Iterator[tuple[str, ...]], left: int) -> Any:
    from rich.table import Table

    if not (found := list(rows)):
        return None
    table = Table(box=None)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right")
    for row in found:
        table.add_row(*row)
    return table
