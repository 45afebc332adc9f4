"""Judges of answers in the model's own words: each returns 1 (right) to 0 for every answer.

An answer is taken as it stands: what follows it must have been cut by the question's ``stop``.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from fastlm.data.verifiers import VERIFIERS, number
from fastlm.evals.latex import final_answer, same
from fastlm.evals.task import Judge

Row = Mapping[str, Any]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def one_by_one(score: Callable[[str, Row], float]) -> Judge:
    """Return the judge that gives each answer its own ``score``."""

    @wraps(score)
    def judge(asked: Sequence[tuple[str, Row]]) -> list[float]:
        return [float(score(answer, row)) for answer, row in asked]

    return judge


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD, Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def golds_of(row: Row) -> list[str]:
    """The right answers of a row, any of which will do."""
    label = row.get("label")
    return _texts(row.get("choices", ()) if label is None else label)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for one in value for text in _texts(one)] if isinstance(value, Sequence) else []


def _first_line(answer: str) -> str:
    return normalized((answer.strip().splitlines() or [""])[0])


@one_by_one
def exact_match(answer: str, row: Row) -> float:
    """1 if the answer's first line is one of the right answers, both `normalized`. An answer of
    which nothing is left is wrong, although some sets list "." or "A" among the right ones."""
    return _first_line(answer) in {normalized(gold) for gold in golds_of(row)} - {""}


@one_by_one
def f1(answer: str, row: Row) -> float:
    """The best F1 of the words of the answer's first line with those of a right answer, all
    `normalized` (SQuAD)."""
    words, best = Counter(_first_line(answer).split()), 0.0
    for gold in golds_of(row):
        right = Counter(normalized(gold).split())
        if shared := (words & right).total():
            best = max(best, 2 * shared / (words.total() + right.total()))
    return best


@one_by_one
def first_word(answer: str, row: Row) -> float:
    """1 if the answer's first word is that of a right answer, both `normalized` (LAMBADA)."""
    golds = {normalized(gold.split()[0]) for gold in golds_of(row) if gold.split()}
    return any(normalized(word) in golds for word in answer.split()[:1])


@one_by_one
def last_number(answer: str, row: Row) -> float:
    """1 if the last number of the answer is that of the row's ``answer`` (GSM8K's rule)."""
    return number(answer, row)


@one_by_one
def latex_answer(answer: str, row: Row) -> float:
    """1 if a solution's final answer is the row's ``answer``, both LaTeX (`fastlm.evals.latex`)."""
    return same(final_answer(answer), row["answer"])


@one_by_one
def generator(answer: str, row: Row) -> float:
    """The score that reasoning-gym's generator of the row gives the answer."""
    return VERIFIERS["reasoning-gym"](answer, row)
