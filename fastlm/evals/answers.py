"""Judges of answers in the model's own words: each returns 1 (right) to 0 for every answer.

An answer is taken as it stands: what follows it must have been cut by the question's ``stop``.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.data.verify import VERIFIERS, number
from fastlm.evals.latex import final_answer, same

Asked = Sequence[tuple[str, Mapping[str, Any]]]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD, Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def golds_of(row: Mapping[str, Any]) -> list[str]:
    """The right answers of a row, any of which will do."""
    found: list[str] = []

    def take(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Sequence):
            for one in value:
                take(one)

    take(row.get("label") if row.get("label") is not None else row.get("choices", ()))
    return found


def exact_match(asked: Asked) -> list[float]:
    """1 if the answer's first line is one of the right answers, both `normalized`. An answer of
    which nothing is left is wrong, although some sets list "." or "A" among the right ones."""
    scores = []
    for answer, row in asked:
        lines = answer.strip().splitlines() or [""]
        wanted = {normalized(gold) for gold in golds_of(row)} - {""}
        scores.append(float(normalized(lines[0]) in wanted))
    return scores


def f1(asked: Asked) -> list[float]:
    """The best F1 of the words of the answer's first line with those of a right answer, all
    `normalized` (SQuAD)."""
    scores = []
    for answer, row in asked:
        words = Counter(normalized((answer.strip().splitlines() or [""])[0]).split())
        golds = [Counter(normalized(gold).split()) for gold in golds_of(row)]
        scores.append(max((_f1(words, gold) for gold in golds), default=0.0))
    return scores


def _f1(words: Counter[str], gold: Counter[str]) -> float:
    shared = (words & gold).total()
    return 2 * shared / (words.total() + gold.total()) if shared else 0.0


def first_word(asked: Asked) -> list[float]:
    """1 if the answer's first word is that of a right answer, both `normalized` (LAMBADA)."""
    scores = []
    for answer, row in asked:
        words = answer.split()[:1]
        wanted = {normalized(gold.split()[0]) for gold in golds_of(row) if gold.split()}
        scores.append(float(bool(words) and normalized(words[0]) in wanted))
    return scores


def last_number(asked: Asked) -> list[float]:
    """1 if the last number of the answer is that of the row's ``answer`` (GSM8K's rule)."""
    return [number(answer, row) for answer, row in asked]


def latex_answer(asked: Asked) -> list[float]:
    """1 if a solution's final answer is the row's ``answer``, both LaTeX (`fastlm.evals.latex`)."""
    return [float(same(final_answer(answer), row["answer"])) for answer, row in asked]


def generator(asked: Asked) -> list[float]:
    """The score that reasoning-gym's generator of the row gives the answer."""
    score = VERIFIERS["reasoning-gym"]
    return [score(answer, row) for answer, row in asked]
