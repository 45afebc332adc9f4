"""Questions about passages, several about one, in OLMES' requests: SQuAD (Rajpurkar et al. 2016,
arXiv:1606.05250), DROP (Dua et al. 2019, arXiv:1903.00161), CoQA (Reddy et al. 2019,
arXiv:1808.07042).

A right answer of DROP is one span or several; several count as one answer, joined by commas.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastlm.errors import InputError
from fastlm.evals.answers import exact_match, f1
from fastlm.evals.sets.olmes import SOURCE, read_open, request_file
from fastlm.evals.task import Open, Task
from fastlm.evals.task_spec import TaskSpec


def squad(q: Open) -> Open:
    return replace(
        q, row={"label": q.row["label"]}, group=q.row["query"].partition("\nQuestion:")[0]
    )


def drop(q: Open) -> Open:
    answers = [", ".join(spans) for spans in q.row["answers"]]
    # the package's own continuation is the text of a Python tuple
    return replace(q, row={"label": answers}, gold=f" {answers[0]}", group=q.row["passage"][:200])


def coqa(q: Open) -> Open:
    return replace(q, row={"label": q.row["label"]}, group=q.row["story"][:200])


def _read(
    spec: TaskSpec,
    name: str,
    format: str,
    cache: Path,
    *,
    folder: str,
    make: Callable[[Open], Open],
) -> Task:
    path, questions = request_file(folder, format, cache), []
    for number, q in enumerate(read_open(path, max_new_tokens=24, as_is=True), 1):
        try:
            questions.append(make(q))
        except (KeyError, IndexError, TypeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}, line {number}: wanted right answers, got {told}") from None
    return spec.task(name, f"olmes:{format}", questions, judge=exact_match, also={"f1": f1})


def _set(
    ability: str, licence: str, format: str, name: str, make: Callable[[Open], Open]
) -> TaskSpec:
    return TaskSpec(ability, licence, (format,), partial(_read, folder=name, make=make), SOURCE)


SETS = {
    "squad": _set("language", "CC-BY-SA-4.0", "bpb_5shot", "squad", squad),
    "drop": _set("reasoning", "CC-BY-SA-4.0", "bpb_5shot", "drop", drop),
    "coqa": _set("language", "by passage", "bpb_0shot", "coqa", coqa),
}
