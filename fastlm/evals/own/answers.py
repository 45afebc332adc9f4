"""lm-evaluation-harness' filters of answers, and its exact match."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.evals.answers import Asked

INVALID = "[invalid]"
# function of a filter -> the options that it has
FILTERS = {
    "take_first": frozenset(), "remove_whitespace": frozenset(), "lowercase": frozenset(),
    "uppercase": frozenset(),
    "regex": frozenset({"regex_pattern", "group_select", "fallback"}),
}  # fmt: skip
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


def filtered(answer: str, filters: Sequence[Mapping[str, Any]]) -> str:
    """The answer after all filters."""
    for one in filters:
        function = one["function"]
        if function == "remove_whitespace":
            answer = answer.lstrip()
        elif function in ("lowercase", "uppercase"):
            answer = answer.lower() if function == "lowercase" else answer.upper()
        elif function == "regex":
            answer = _found(answer, one)
    return answer


def _found(answer: str, one: Mapping[str, Any]) -> str:
    found = re.findall(one.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"), answer)
    fallback, place = one.get("fallback", INVALID), one.get("group_select", 0)
    if not -len(found) <= place < len(found):
        return fallback
    match = found[place]
    if isinstance(match, tuple):
        match = next(filter(None, match), fallback)
    return match.strip()


def _reduced(text: str, options: Mapping[str, Any]) -> str:
    for pattern in options.get("regexes_to_ignore") or ():
        text = re.sub(pattern, "", text)
    if options.get("ignore_case"):
        text = text.lower()
    if options.get("ignore_punctuation"):
        text = text.translate(_PUNCTUATION)
    if options.get("ignore_numbers"):
        text = text.translate(_DIGITS)
    return text


def exact(answer: str, row: Mapping[str, Any], filters: Sequence[Mapping[str, Any]]) -> float:
    """1 if the answer after the filters is one of the row's right ones, by the row's options."""
    options = row["options"]
    told = _reduced(filtered(answer, filters), options)
    return float(any(told == _reduced(gold, options) for gold in row["label"]))


def first_filter(asked: Asked) -> list[float]:
    """`exact` after the first of the task's filters, which stand in each row."""
    return [exact(answer, row, row["filters"][0]) for answer, row in asked]


def greedy(asked: Asked) -> list[float]:
    """1 if the answer begins with the right one: it was the likeliest (output type
    loglikelihood)."""
    return [float(answer.startswith(row["label"][0])) for answer, row in asked]
