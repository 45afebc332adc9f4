"""Code sets: HumanEval (Chen et al. 2021, arXiv:2107.03374) and MBPP (Austin et al. 2021,
arXiv:2108.07732). A program passes if its tests pass in the sandbox (`fastlm.sandbox`).

HumanEval's format ``completion`` is the published prompt; ``gold_bpb_0shot`` is OLMES' format with
a code fence after it. MBPP has OLMES' format: the task, one of its tests, and a code fence.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.sets.olmes import SOURCE, read_open, request_file
from fastlm.evals.task import JudgeInputs, OpenQuestion, TaskSpec

ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")  # those of Codex, and a fence's end
TOKENS = 512  # the longest right answers have 268 (HumanEval) and 415 (MBPP) SmolLM2 tokens


def passes_tests(answers: JudgeInputs) -> list[float]:
    """Return 1 for each answer with a program that passes its tests."""
    from fastlm.sandbox import Case, run_all

    cases = [
        Case(extract_program(answer, row), row["tests"], setup=row["setup"], names=[row["name"]])
        for answer, row in answers
    ]
    return [float(outcome.passed) for outcome in run_all(cases)]


def check_sandbox() -> None:
    """Raise InputError if this machine cannot run programs."""
    from fastlm.sandbox import SandboxError, check_machine

    try:
        check_machine()
    except SandboxError as error:
        raise InputError(str(error)) from None


def extract_program(answer: str, row: Mapping[str, Any]) -> str:
    """Return the program: the answer, after the prompt if that begins the function."""
    answer, prompt = extract_code(answer), row["prompt"]
    # the prompt is a program by itself, and may have imports and helpers
    is_complete = not prompt or f"def {row['name']}(" in answer
    return f"{prompt}\n{answer}" if is_complete else f"{prompt}{answer}"


def extract_code(answer: str) -> str:
    """Return the content of the answer's first code fence, or the answer if it has none."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    head = answer[: answer.index("```")]
    if head.strip():  # the prompt opened the fence that ends here
        return head
    return rest.partition("\n")[2].partition("```")[0]


def _humaneval(q: OpenQuestion) -> OpenQuestion:
    doc = q.row
    prompt, name = doc["prompt"], doc["entry_point"]
    tests = f"{doc['test']}\ncheck({name})\n"
    row = {"prompt": prompt, "name": name, "tests": tests, "setup": prompt}
    return replace(q, gold=doc["canonical_solution"], row=row, stop=(*q.stop, "\n```"))


def _completion(q: OpenQuestion) -> OpenQuestion:
    return replace(_humaneval(q), prompt=q.row["prompt"], stop=ENDS)


def _mbpp(q: OpenQuestion) -> OpenQuestion:
    doc = q.row
    # the setup builds trees with the program's class
    tests = "\n".join([doc["test_setup_code"], *doc["test_list"]])
    gold = doc["code"].replace("\r", "")
    row = {
        "prompt": "",
        "name": _tested_function(doc["test_list"], gold),
        "tests": tests,
        "setup": "",
    }
    return replace(q, gold=gold, row=row)


def _tested_function(tests: list[str], gold: str) -> str:
    """Return the function of the right program that the tests call. ValueError: there is none."""
    for part in gold.split("def ")[1:]:
        name = part.partition("(")[0].strip()
        if name.isidentifier() and any(f"{name}(" in test for test in tests):
            return name
    raise ValueError("tests: expected a call of a function of the right program, got none")


def _set(licence: str, folder: str, **make: Callable[[OpenQuestion], OpenQuestion]) -> TaskSpec:
    """Return a set. ``make``: format -> function that converts OLMES' questions."""

    def read(format: str, cache: Path) -> dict[str, Any]:
        path = request_file(folder, "gold_bpb_0shot", cache)
        template = "codex:completion" if format == "completion" else f"olmes:{format}"
        return {
            "questions": read_open(path, TOKENS, make[format]), "format": template,
            "judge": passes_tests, "metric": "pass", "check": check_sandbox,
        }  # fmt: skip

    return TaskSpec("coding", licence, tuple(make), SOURCE, read)


SETS = {
    "humaneval": _set("MIT", "codex_humaneval", completion=_completion, gold_bpb_0shot=_humaneval),
    "mbpp": _set("CC-BY-4.0", "codex_mbpp", gold_bpb_0shot=_mbpp),
}
