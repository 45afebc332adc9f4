"""Short questions about facts: TriviaQA (Joshi et al. 2017, arXiv:1705.03551) and NQ-open (Lee et
al. 2019, arXiv:1906.00300).

Templates are lm-evaluation-harness', but an answer ends only with its line: the harness also ends
it at a full stop or a comma, within "Washington, D.C.". The package holds no training split, so the
five examples of ``5shot`` are the first five questions, which are then not asked.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastlm.errors import InputError
from fastlm.evals.answers import exact_match, f1
from fastlm.evals.sets.arrow import Row, made, read_split, text_of
from fastlm.evals.sets.olmes import SOURCE
from fastlm.evals.task import Open, Task
from fastlm.evals.task_spec import TaskSpec

# A row -> what is asked, the answer as examples show it, the right one, all right answers
Template = Callable[[Row], tuple[str, str, str, Sequence[str]]]


def triviaqa(row: Row) -> tuple[str, str, str, Sequence[str]]:
    """Examples show the first alias, as in the harness."""
    answer = row["answer"]
    value = text_of(answer, "value")
    names = [value, *answer["aliases"]]
    shown = [*answer["aliases"], value][0]
    return f"Question: {text_of(row, 'question')}?\nAnswer:", shown, value, names


def nq_open(row: Row) -> tuple[str, str, str, Sequence[str]]:
    answers = row["answer"]
    if not answers or not all(isinstance(one, str) for one in answers):
        raise ValueError(f"answer: wanted texts, got {answers!r:.60}")
    return f"Q: {text_of(row, 'question')}?\nA:", answers[0], answers[0], answers


def _read(
    spec: TaskSpec,
    name: str,
    format: str,
    cache: Path,
    *,
    folder: str,
    template: Template,
    begin: str,
    between: str,
) -> Task:
    rows = read_split(folder, "validation", cache)
    asked = made(name, rows, lambda _, row: template(row))
    shots = int(format[0])
    if len(asked) <= shots:
        raise InputError(f"{name}: wanted more than the {shots} examples, got {len(asked)} rows")
    begin += "".join(f"{text} {answer}{between}" for text, answer, *_ in asked[:shots])
    questions = [
        Open(
            str(i), begin + text, {"label": list(answers)}, f" {answer}", stop=("\n",),
            max_new_tokens=24,
        )
        for i, (text, _, answer, answers) in enumerate(asked)
        if i >= shots
    ]  # fmt: skip
    return spec.task(name, f"lm-eval:{format}", questions, judge=exact_match, also={"f1": f1})


def _set(
    licence: str, folder: str, template: Template, begin: str = "", between: str = "\n\n"
) -> TaskSpec:
    read = partial(_read, folder=folder, template=template, begin=begin, between=between)
    return TaskSpec("facts", licence, ("5shot", "0shot"), read, SOURCE)


SETS = {
    "triviaqa": _set("not stated", "trivia_qa/rc.wikipedia.nocontext", triviaqa),
    "nq_open": _set(
        "CC-BY-SA-3.0", "nq_open/none", nq_open, "Answer these questions:\n\n", between="\n"
    ),
}
