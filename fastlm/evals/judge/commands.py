"""The command ``fastlm label``."""

from pathlib import Path
from typing import Annotated

import typer


def label_command(
    grades: Annotated[Path, typer.Argument(help="Label answers of this folder of fastlm judge")],
    labels: Annotated[Path, typer.Argument(help="Add labels to this .jsonl file")],
    rater: Annotated[str, typer.Option("--rater", "-r", help="Set your name")],
    count: Annotated[int, typer.Option(min=1, help="Label this many answers")] = 100,
) -> None:
    """Label judged answers, to measure the judge: fastlm judge --labels reads the file.

    You see neither the judge's grades nor the names of models. Half of the answers are a random
    sample, half are those of which the judge is least sure. Each label is stored at once, and the
    same command continues. Several raters may use the same file. If stdin is not a terminal, each
    of its lines is an input.
    """
    from fastlm.errors import InputError
    from fastlm.evals.judge.label_terminal import label_answers

    if labels.suffix != ".jsonl":
        raise InputError(f"labels: expected a name that ends in .jsonl, got {labels}")
    typer.echo(label_answers(grades, labels, rater, count))
