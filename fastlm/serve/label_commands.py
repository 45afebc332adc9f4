"""The command ``fastlm label``."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastlm.errors import InputError
from fastlm.pipeline.commands import options_command
from fastlm.pipeline.stage import Positional, at_least_one
from fastlm.serve.commands import needs_serve, read_keys
from fastlm.serve.options import ListenOptions
from fastlm.terminal import echo

if TYPE_CHECKING:
    from fastlm.evals.judge.items import JudgeItem
    from fastlm.evals.judge.rubric import Rubric


@dataclass(frozen=True, kw_only=True)
class LabelOptions(ListenOptions):
    """The options of ``fastlm label``."""

    grades: Annotated[
        Path, Positional("Label answers of this folder of fastlm judge or fastlm safety")
    ]
    labels: Annotated[Path, Positional("Add labels to this .jsonl file")]
    rater: Annotated[str | None, "Set your name; on the page each rater enters one", "-r"] = None
    count: Annotated[int, "Label this many answers"] = 100
    score: Annotated[str | None, "Label answers of this score of fastlm safety"] = None
    page: Annotated[bool, "Serve a page on which raters label in a browser"] = False


def _label(options: LabelOptions) -> None:
    """Label judged answers, to measure the judge: --labels of fastlm judge and of fastlm safety
    reads the file.

    You see neither the judge's grades nor the names of models. Of fastlm judge, half of the answers
    are a random sample, half are those of which the judge is least sure; of fastlm safety, all are
    a random sample of a score. Each label is stored at once, and the same command continues.
    Several raters may use the same file. If stdin is not a terminal, each of its lines is an input.
    """
    from fastlm.evals.judge.label_store import LabelStore
    from fastlm.evals.judge.label_terminal import label_answers

    at_least_one(options, "count")
    if options.labels.suffix != ".jsonl":
        raise InputError(f"labels: expected a name that ends in .jsonl, got {options.labels}")
    if options.page == (options.rater is not None):
        raise InputError("rater: expected --rater NAME or --page, where raters enter their names")
    if not options.page:
        _check_no_server(options)
    items, rubric = _items(options)
    if options.rater is not None:
        with LabelStore(items, rubric, options.labels) as store:
            echo(label_answers(store, options.rater))
        return
    keys = read_keys(options.api_key_file)
    options.check_address(keys)
    with needs_serve("label"):
        from fastlm.serve import label_server
    with LabelStore(items, rubric, options.labels) as store:
        label_server.run(store, options, keys)


def _check_no_server(options: LabelOptions) -> None:
    """InputError: an option of the server, which only --page starts."""
    for field in fields(ListenOptions):
        value = getattr(options, field.name)
        if value != field.default:
            text = " ".join(value) if isinstance(value, tuple) else value
            raise InputError(f"{field.name}: expected with --page, got {text} without it")


def _items(options: LabelOptions) -> "tuple[list[JudgeItem], Rubric]":
    """Return the answers to label, in the order in which raters are asked."""
    from fastlm.evals.judge.graded_file import read_graded
    from fastlm.evals.judge.labels import label_order
    from fastlm.evals.safety.labels import RUBRIC, VERDICTS, safety_items

    if (options.grades / VERDICTS).is_file():
        return safety_items(options.grades, options.score, options.count), RUBRIC
    if options.score is not None:
        raise InputError(f"score: expected with a folder of fastlm safety, got {options.grades}")
    graded, rubric = read_graded(options.grades)
    return [g.item for g in label_order(graded, rubric, options.count)], rubric


label_command = options_command(LabelOptions, _label)
