"""Programs: HumanEval (Chen et al. 2021, arXiv:2107.03374) and MBPP (Austin et al. 2021,
arXiv:2108.07732). A program passes if its tests do, in the sandbox (`fastlm.sandbox`).

HumanEval's format ``completion`` is the prompt as published; ``gold_bpb_0shot`` is OLMES', with a
code fence after it. MBPP is OLMES': the task, one of its tests, and a code fence.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.answers import Asked
from fastlm.evals.sets.olmes import SOURCE, read_open, request_file
from fastlm.evals.task import Open, Task
from fastlm.evals.task_spec import TaskSpec

ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")  # Codex', and the end of a fence
TOKENS = 512  # the longest right answers have 268 (HumanEval) and 415 (MBPP) of SmolLM2's


def passes(asked: Asked) -> list[float]:
    """1 if the answer's program passes the tests of its row."""
    from fastlm.sandbox import Case, run_all

    cases = [
        Case(program_of(answer, row), row["tests"], setup=row["setup"], names=[row["name"]])
        for answer, row in asked
    ]
    return [float(outcome.passed) for outcome in run_all(cases)]


def can_run() -> None:
    """InputError: this machine cannot run programs."""
    from fastlm.sandbox import SandboxError, check_machine

    try:
        check_machine()
    except SandboxError as error:
        raise InputError(str(error)) from None


def program_of(answer: str, row: Mapping[str, Any]) -> str:
    """The program: the answer after its prompt, from which the function may have been begun."""
    answer, prompt = fenced(answer), row["prompt"]
    # a prompt is a program of its own, and may hold imports and helpers
    whole = not prompt or f"def {row['name']}(" in answer
    return f"{prompt}\n{answer}" if whole else f"{prompt}{answer}"


def fenced(answer: str) -> str:
    """What stands in the answer's first code fence; all of it if there is none."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    head = answer[: answer.index("```")]
    if head.strip():  # the prompt had opened the fence that ends here
        return head
    return rest.partition("\n")[2].partition("```")[0]


def humaneval(q: Open, format: str) -> Open:
    doc = q.row
    prompt, name = doc["prompt"], doc["entry_point"]
    tests = f"{doc['test']}\ncheck({name})\n"
    row = {"prompt": prompt, "name": name, "tests": tests, "setup": prompt}
    gold = doc["canonical_solution"]
    if format == "completion":
        return replace(q, prompt=prompt, gold=gold, row=row, stop=ENDS)
    return replace(q, gold=gold, row=row, stop=(*q.stop, "\n```"))


def mbpp(q: Open, format: str) -> Open:
    del format
    doc = q.row
    # the set's setup builds trees from the program's class
    tests = "\n".join([doc["test_setup_code"], *doc["test_list"]])
    gold = doc["code"].replace("\r", "")
    row = {"prompt": "", "name": _called(doc["test_list"], gold), "tests": tests, "setup": ""}
    return replace(q, gold=gold, row=row)


def _called(tests: list[str], gold: str) -> str:
    """The function that the tests call. ValueError: none that the right program defines."""
    for part in gold.split("def ")[1:]:
        name = part.partition("(")[0].strip()
        if name.isidentifier() and any(f"{name}(" in test for test in tests):
            return name
    raise ValueError("tests: wanted a call of a function of the right program, got none")


def _reader(
    folder: str, make: Callable[[Open, str], Open]
) -> Callable[[TaskSpec, str, str, Path], Task]:
    def read(spec: TaskSpec, name: str, format: str, cache: Path) -> Task:
        kept = "gold_bpb_0shot" if format == "completion" else format
        path, questions = request_file(folder, kept, cache), []
        for number, q in enumerate(read_open(path, max_new_tokens=TOKENS, as_is=True), 1):
            try:
                questions.append(make(q, format))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                told = f"{type(error).__name__}: {error}"
                raise InputError(f"{path}, line {number}: wanted tests, got {told}") from None
        template = "codex:completion" if format == "completion" else f"olmes:{format}"
        return spec.task(name, template, questions, judge=passes, metric="pass", check=can_run)

    return read


SETS = {
    "humaneval": TaskSpec(
        "coding", "MIT", ("completion", "gold_bpb_0shot"), _reader("codex_humaneval", humaneval),
        SOURCE,
    ),
    "mbpp": TaskSpec(
        "coding", "CC-BY-4.0", ("gold_bpb_0shot",), _reader("codex_mbpp", mbpp), SOURCE
    ),
}  # fmt: skip
