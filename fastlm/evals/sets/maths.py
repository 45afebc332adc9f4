"""Mathematics in words: GSM8K (Cobbe et al. 2021, arXiv:2110.14168) and MATH (Hendrycks et al.
2021, arXiv:2103.03874).

The requests are OLMES': GSM8K with eight examples that reason in steps, MATH with Minerva's four.
A model writes a solution, of which the final answer is compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastlm.data.verify import gold_number
from fastlm.errors import InputError
from fastlm.evals.answers import last_number, latex_answer
from fastlm.evals.latex import boxed
from fastlm.evals.sets.olmes import SOURCE, read_open, request_file
from fastlm.evals.task import Judge, Open, Task
from fastlm.evals.task_spec import TaskSpec

# Of an answer; of SmolLM2's, the longest right ones have 299 (GSM8K) and 1,549, 95 % at most 639
# (MATH-500). OLMES asks for at most 512 and 1,024.
GSM8K_TOKENS, MATH_TOKENS = 320, 1024
MATH = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
)  # fmt: skip


def gsm8k(q: Open) -> Open:
    row = {"answer": q.row["short_answer"]}
    gold_number(row)
    return replace(q, row=row)


def math(q: Open) -> Open:
    answer = boxed(q.row["solution"])
    if not answer:
        raise InputError("solution: wanted a boxed answer, got none")
    kind = q.row.get("type") or f"level {q.row['level']}"
    return replace(q, row={"answer": answer}, part=kind)


def _questions(path: Path, make: Callable[[Open], Open], tokens: int, begin: str) -> list[Open]:
    found = []
    for number, q in enumerate(read_open(path, max_new_tokens=tokens), 1):
        try:
            found.append(make(replace(q, id=f"{begin}{q.id}")))
        except KeyError as error:
            raise InputError(f"{path}, line {number}: wanted {error}, got none") from None
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return found


def _read(
    spec: TaskSpec,
    name: str,
    format: str,
    cache: Path,
    *,
    folders: Sequence[str],
    make: Callable[[Open], Open],
    tokens: int,
    judge: Judge,
) -> Task:
    questions = [
        q
        for folder in folders
        for q in _questions(
            request_file(folder, format, cache), make, tokens,
            f"{folder}/" if len(folders) > 1 else "",
        )
    ]  # fmt: skip
    return spec.task(name, f"olmes:{format}", questions, judge=judge)


def _set(
    format: str, folders: Sequence[str], make: Callable[[Open], Open], tokens: int, judge: Judge
) -> TaskSpec:
    read = partial(_read, folders=folders, make=make, tokens=tokens, judge=judge)
    return TaskSpec("mathematics", "MIT", (format,), read, SOURCE)


SETS = {
    "gsm8k": _set("gold_bpb_5shot", ["gsm8k"], gsm8k, GSM8K_TOKENS, last_number),
    "math500": _set("gold_bpb_0shot", ["minerva_math_500"], math, MATH_TOKENS, latex_answer),
    "math": _set(
        "gold_bpb_0shot", [f"minerva_math_{one}" for one in MATH], math, MATH_TOKENS, latex_answer
    ),
}
