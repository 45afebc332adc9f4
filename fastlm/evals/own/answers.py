"""lm-evaluation-harness' filters of answers, and its exact match.

A task's patterns are a stranger's: they run in the process that renders its templates, under its
limits of time and memory. (The package regex has a limit of time, but runs out of memory on
``((a{1000}){1000}){1000}``.)
"""

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.answers import Asked
from fastlm.tokenizer.chat_template import render_plain

INVALID = "[invalid]"
NUMBER = r"#### (\-?[0-9\.\,]+)"  # the pattern of a regex filter that names none


class Filter(TypedDict):
    """One step from an answer to what is compared; a regex has options."""

    function: Literal["take_first", "remove_whitespace", "lowercase", "uppercase", "regex"]
    regex_pattern: NotRequired[str]
    group_select: NotRequired[int]
    fallback: NotRequired[str]


# texts on which a pattern that backtracks without end shows it
PROBES = tuple(f"{text * 500}!" for text in ("a", "1", " ", "a ", "1,", "\n"))
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


def check_pattern(pattern: str) -> None:
    """Raise InputError for a pattern that is none, or that takes too long on simple texts: an
    answer would be refused only after the model wrote it.
    """
    for text in ("", *PROBES):
        matches(pattern, text)


def matches(pattern: str, text: str) -> list[Any]:
    """`re.findall`, under limits. InputError: no pattern, or it exceeds them."""
    try:
        template = "{{ text | regex_findall(pattern) | tojson }}"
        return json.loads(render_plain(template, {"pattern": pattern, "text": text}))
    except InputError as error:
        raise _refused(pattern, error) from None


def without(pattern: str, text: str) -> str:
    """`re.sub` by nothing, under limits. InputError as `matches`."""
    try:
        template = "{{ text | regex_replace(pattern, '') }}"
        return render_plain(template, {"pattern": pattern, "text": text})
    except InputError as error:
        raise _refused(pattern, error) from None


def _refused(pattern: str, error: InputError) -> InputError:
    why = str(error).removeprefix("template: cannot be rendered: ")
    why = why.replace("wanted a template that ends", "it does not end")
    return InputError(f"expected a pattern of Python's re, got {pattern!r:.80}: {why}")


def _found(answer: str, one: Mapping[str, Any]) -> str:
    found = matches(one.get("regex_pattern", NUMBER), answer)
    fallback, place = one.get("fallback", INVALID), one.get("group_select", 0)
    if not -len(found) <= place < len(found):
        return fallback
    match = found[place]
    if isinstance(match, list):  # of several groups
        match = next(filter(None, match), fallback)
    return match.strip()


def _reduced(text: str, options: Mapping[str, Any]) -> str:
    for pattern in options.get("regexes_to_ignore") or ():
        text = without(pattern, text)
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
