"""Questions of reasoning-gym's generators, which also score the answers: ``reasoning-gym:NAME`` or
``reasoning-gym:NAME?size=50&seed=1`` (`fastlm.sources.generated`), and some of them by name.

The first three rows are examples and are not asked. Only generators whose scores were reviewed are
accepted.
"""

import copy
from itertools import islice
from pathlib import Path

from fastlm.errors import InputError
from fastlm.evals.answers import generator
from fastlm.evals.task import Open, Task
from fastlm.evals.task_spec import TaskSpec
from fastlm.sources.generated import SCHEME, check_scored, generated_rows, package_version

EXAMPLES = 3
SIZE = 100  # questions of a generator by default
TOKENS = 128


def read_generator(spec: TaskSpec, name: str, format: str, cache: Path) -> Task:
    """Read ``NAME?KEY=VALUE&...``. InputError: as `generated_rows`; too few rows; no package."""
    del cache
    source = f"{SCHEME}:{format}"
    if "size=" not in source:
        source += f"{'&' if '?' in source else '?'}size={SIZE + EXAMPLES}"
    check_scored(source)
    rows = list(generated_rows(source))
    if len(rows) <= EXAMPLES:
        raise InputError(
            f"{name}: wanted size={EXAMPLES + 1} or more, of which {EXAMPLES} are examples,"
            f" got {len(rows)}"
        )
    begin = "".join(f"{_asked(row)} {row['answer']}\n\n" for row in islice(rows, EXAMPLES))
    questions = []
    for number, row in enumerate(rows[EXAMPLES:]):
        gold = f" {row['answer']}"
        stop = ("\n\n",) if any("\n" in str(r["answer"]) for r in rows) else ("\n",)
        text = begin + _asked(row)
        questions.append(Open(str(number), text, copy.deepcopy(row), gold, stop, TOKENS))
    version = f"{EXAMPLES}shot:{SCHEME} {package_version()}"
    return spec.task(name, version, questions, judge=generator, metric="score")


def _asked(row: dict) -> str:
    return f"Question: {row['question'].strip()}\nAnswer:"


def _spec(ability: str, generator: str) -> TaskSpec:
    formats = (f"{generator}?size={SIZE + EXAMPLES}",)
    return TaskSpec(ability, "Apache-2.0", formats, read_generator, f"{SCHEME}:{generator}")


ANY = TaskSpec("reasoning", "Apache-2.0", ("NAME?KEY=VALUE",), read_generator, SCHEME, free=True)
SETS = {
    name: _spec(ability, name)
    for ability, names in {
        "mathematics": ("gsm_symbolic", "chain_sum", "base_conversion", "simple_equations"),
        "reasoning": ("syllogism", "knights_knaves", "family_relationships", "leg_counting"),
        "coding": ("bf", "list_functions", "string_manipulation"),
        "language": ("letter_counting", "word_sorting"),
    }.items()
    for name in names
}
