"""Questions of reasoning-gym's generators, which also score the answers: ``reasoning-gym:NAME`` or
``reasoning-gym:NAME?size=50&seed=1`` (`fastlm.sources.reasoning_gym`), and some of them by name.

The first three rows are the examples. A generator may repeat its questions: each counts once,
because copies are no independent measurements, and none repeats an example. Only generators with
reviewed scores are accepted.
"""

import copy
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.answers import reasoning_gym_score
from fastlm.evals.task import OpenQuestion, TaskSpec
from fastlm.sources.reasoning_gym import SCHEME, check_scorable, package_version, reasoning_gym_rows

EXAMPLES = 3
SIZE = 100  # questions of a generator by default
TOKENS = 128


def _read(format: str, cache: Path) -> dict[str, Any]:
    """Read ``NAME?KEY=VALUE&...``.

    InputError: as `reasoning_gym_rows`; too few rows; the package is missing.
    """
    del cache
    source = f"{SCHEME}:{format}"
    if "size=" not in source:
        source += f"{'&' if '?' in source else '?'}size={SIZE + EXAMPLES}"
    check_scorable(source)
    distinct: dict[str, dict[str, Any]] = {}
    for row in reasoning_gym_rows(source):
        distinct.setdefault(row["question"].strip(), row)
    rows = list(distinct.values())
    if len(rows) <= EXAMPLES:
        raise InputError(
            f"{source}: expected size={EXAMPLES + 1} or more, of which {EXAMPLES} are examples,"
            f" got {len(rows)} different questions"
        )
    texts = [f"Question: {row['question'].strip()}\nAnswer:" for row in rows]
    begin = "".join(f"{text} {row['answer']}\n\n" for text, row in zip(texts[:EXAMPLES], rows))
    stop = ("\n\n",) if any("\n" in str(row["answer"]) for row in rows) else ("\n",)
    questions = [
        OpenQuestion(str(i), begin + text, copy.deepcopy(row), f" {row['answer']}", stop, TOKENS)
        for i, (text, row) in enumerate(zip(texts[EXAMPLES:], rows[EXAMPLES:], strict=True))
    ]
    return {
        "questions": questions, "format": f"{EXAMPLES}shot:distinct:{SCHEME} {package_version()}",
        "judge": reasoning_gym_score, "metric": "score",
    }  # fmt: skip


ANY = TaskSpec("reasoning", "Apache-2.0", ("NAME?KEY=VALUE",), SCHEME, _read, any_format=True)
SETS = {
    name: TaskSpec(
        ability, "Apache-2.0", (f"{name}?size={SIZE + EXAMPLES}",), f"{SCHEME}:{name}", _read
    )
    for ability, names in {
        "mathematics": ("gsm_symbolic", "chain_sum", "base_conversion", "simple_equations"),
        "reasoning": ("syllogism", "knights_knaves", "family_relationships", "leg_counting"),
        "coding": ("bf", "list_functions", "string_manipulation"),
        "language": ("letter_counting", "word_sorting"),
    }.items()
    for name in names
}
