"""Judges of free-form answers: each returns a score from 0 to 1 (right) for every answer.

An answer is scored as it is: the question's ``stop`` must have removed what follows it.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import wraps
from typing import Any

from fastlm.data import verifiers
from fastlm.evals.latex import canonical, final_answer, is_equivalent
from fastlm.evals.task import Judge, Vote

Row = Mapping[str, Any]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def per_answer(score: Callable[[str, Row], float]) -> Judge:
    """Turn a function that scores one answer into a judge."""

    @wraps(score)
    def judge(answers: Sequence[tuple[str, Row]]) -> list[float]:
        return [float(score(answer, row)) for answer, row in answers]

    return judge


def normalize(text: str) -> str:
    """Lower-case a text and remove punctuation, articles and extra spaces (SQuAD, Rajpurkar et al.
    2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def gold_answers(row: Row) -> list[str]:
    """Return the right answers of a row; each of them counts as right."""
    label = row.get("label")
    return _texts(row.get("choices", ()) if label is None else label)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for item in value for text in _texts(item)] if isinstance(value, Sequence) else []


def _first_line(answer: str) -> str:
    return normalize((answer.strip().splitlines() or [""])[0])


@per_answer
def exact_match(answer: str, row: Row) -> float:
    """Return 1 if the answer's first line is one of the right answers, both by `normalize`. An
    answer that normalizes to "" is wrong, although some sets list "." or "A" as right answers."""
    return _first_line(answer) in {normalize(gold) for gold in gold_answers(row)} - {""}


@per_answer
def f1(answer: str, row: Row) -> float:
    """Return the best F1 between the words of the answer's first line and a right answer, both by
    `normalize` (SQuAD)."""
    words, best = Counter(_first_line(answer).split()), 0.0
    for gold in gold_answers(row):
        right = Counter(normalize(gold).split())
        if shared := (words & right).total():
            best = max(best, 2 * shared / (words.total() + right.total()))
    return best


@per_answer
def first_word(answer: str, row: Row) -> float:
    """Return 1 if the answer's first word is that of a right answer, by `normalize` (LAMBADA)."""
    golds = {normalize(gold.split()[0]) for gold in gold_answers(row) if gold.split()}
    return any(normalize(word) in golds for word in answer.split()[:1])


@per_answer
def last_number(answer: str, row: Row) -> float:
    """Return 1 if the answer's last number is that of the row's ``answer`` (GSM8K's rule)."""
    return verifiers.number(answer, row)


@per_answer
def latex_answer(answer: str, row: Row) -> float:
    """Return 1 if a solution's final answer equals the row's ``answer``, both in LaTeX
    (`fastlm.evals.latex`)."""
    return is_equivalent(final_answer(answer), row["answer"])


@per_answer
def reasoning_gym_score(answer: str, row: Row) -> float:
    """Return the score of the answer by reasoning-gym's generator of the row."""
    return verifiers.VERIFIERS["reasoning-gym"](answer, row)


def _number_vote(answer: str) -> float | None:
    """Return the last number to 7 digits: the judge holds numbers that differ by 1e-6 equal."""
    value = verifiers.last_number(answer)
    return None if value is None else float(f"{value:.7g}")


def _latex_vote(answer: str) -> Hashable:
    value = canonical(final_answer(answer))
    return None if value == "" else value  # 0 is a vote


# The final answers that these judges compare
VOTES: Mapping[Judge, Vote] = {
    exact_match: lambda answer: _first_line(answer) or None,
    first_word: lambda answer: next(map(normalize, answer.split()), "") or None,
    last_number: _number_vote,
    latex_answer: _latex_vote,
}
