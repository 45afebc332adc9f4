"""The question sets that `fastlm eval --tasks NAME` knows, by name.

The data is read from packages at run time and is not part of fastlm, or a seeded program makes it.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlm.errors import InputError
from fastlm.evals.harness_tasks import is_task_file, read_task
from fastlm.evals.sets import arrow, code, generators, instructions, long_context, mmlu, olmes
from fastlm.evals.task import ABILITIES, Task, TaskSpec
from fastlm.sources.reasoning_gym import SCHEME

SETS: dict[str, TaskSpec] = {
    **olmes.SETS, **mmlu.SETS, **arrow.SETS, **code.SETS, **generators.SETS, **long_context.SETS,
    **instructions.SETS,
}  # fmt: skip


def task_names(selection: Sequence[str]) -> list[str]:
    """Return the names of sets that ``asked`` means: an ability stands for its sets, "all" for all
    of them."""
    names: list[str] = []
    for item in selection:
        if item == "all" or item in ABILITIES:
            names += [n for n, s in SETS.items() if item in ("all", s.ability)]
        else:
            names.append(item)
    return list(dict.fromkeys(names))


def load_task(asked: str, cache: Path) -> Task:
    """Read the set ``NAME`` or ``NAME:FORMAT``, ``reasoning-gym:GENERATOR?KEY=VALUE&...``, or a
    task of the user's own in lm-evaluation-harness' format (.yaml).

    InputError: an unknown name or format, a package that cannot be fetched, damaged data.
    """
    if is_task_file(asked):
        return read_task(asked, cache)
    name, _, format = asked.partition(":")
    if name == SCHEME:
        return generators.ANY.load(asked, format, cache)
    spec = SETS.get(name)
    if spec is None:
        near = difflib.get_close_matches(name, [*SETS, *ABILITIES], n=1, cutoff=0.0)
        raise InputError(
            f"task: expected a name such as {near[0]} (fastlm tasks), got {asked!r:.80}"
        )
    return spec.load(name, format, cache)


def registered_tasks() -> Iterator[dict[str, str]]:
    """Yield what is known about each set: name, ability, formats, licence, source."""
    for name, s in SETS.items():
        yield {
            "name": name, "ability": s.ability, "formats": ", ".join(s.formats),
            "licence": s.licence, "source": s.source,
        }  # fmt: skip
