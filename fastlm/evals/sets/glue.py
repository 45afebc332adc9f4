"""Sets of GLUE and SuperGLUE, in lm-evaluation-harness' templates, without examples.

Wang et al. 2018 (arXiv:1804.07461) and 2019 (arXiv:1905.00537). Only their validation splits are in
the package, and these are what is asked.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastlm.evals.sets.arrow import Row, label_of, made, read_split, text_of
from fastlm.evals.sets.olmes import SOURCE
from fastlm.evals.task import Choices, Pair, Task
from fastlm.evals.task_spec import TaskSpec

Template = Callable[[Row], tuple[str, list[str]]]  # the text of a question, its answers


def copa(row: Row) -> tuple[str, list[str]]:
    """The answers begin with a space, beside the one that stands before every answer."""
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [text_of(row, key) for key in ("choice1", "choice2")]
    return (
        f"{text_of(row, 'premise').strip()[:-1]} {word}",
        [f" {c[0].lower()}{c[1:]}" for c in choices],
    )


def rte(row: Row) -> tuple[str, list[str]]:
    asked = f"Question: {text_of(row, 'sentence2')} True or False?"
    return f"{text_of(row, 'sentence1')}\n{asked}\nAnswer:", ["True", "False"]


def cb(row: Row) -> tuple[str, list[str]]:
    asked = f"Question: {text_of(row, 'hypothesis')}. True, False, or Neither?"
    return f"{text_of(row, 'premise')}\n{asked}\nAnswer:", ["True", "False", "Neither"]


def sst2(row: Row) -> tuple[str, list[str]]:
    asked = "Question: Is this sentence positive or negative?"
    return f"{text_of(row, 'sentence')}\n{asked}\nAnswer:", ["negative", "positive"]


def mrpc(row: Row) -> tuple[str, list[str]]:
    first, second = text_of(row, "sentence1"), text_of(row, "sentence2")
    asked = "Question: Do both sentences mean the same thing?"
    return f"Sentence 1: {first}\nSentence 2: {second}\n{asked}\nAnswer:", ["no", "yes"]


def requests_of(template: Template, row: Row) -> tuple[Pair, ...]:
    text, answers = template(row)
    return tuple((text, f" {answer}") for answer in answers)


def _read(
    spec: TaskSpec, name: str, format: str, cache: Path, *, folder: str, template: Template
) -> Task:
    def make(number: int, row: Row) -> Choices:
        requests = requests_of(template, row)
        return Choices(str(row.get("idx", number)), requests, label_of(row, len(requests)))

    rows = read_split(folder, "validation", cache)
    return spec.task(name, f"lm-eval:{format}", made(name, rows, make))


def _set(ability: str, licence: str, folder: str, template: Template) -> TaskSpec:
    read = partial(_read, folder=folder, template=template)
    return TaskSpec(ability, licence, ("rc_0shot",), read, SOURCE)


SETS = {
    "copa": _set("reasoning", "BSD-2-Clause", "super_glue/copa", copa),
    "rte": _set("language", "not stated", "glue/rte", rte),
    "cb": _set("language", "not stated", "super_glue/cb", cb),
    "sst2": _set("language", "not stated", "glue/sst2", sst2),
    "mrpc": _set("language", "not stated", "glue/mrpc", mrpc),
}
