"""Verifiable rewards: functions (answer, row) -> number. ``row`` is the prompt's row of data.

The option ``reward_function`` names one of `VERIFIERS`, or the user's own function as
``file.py:function`` or ``package.module:function``.
"""

import importlib
import importlib.util
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.sources.reasoning_gym import SCHEME, check_reasoning_gym_row, score_reasoning_gym

Reward = Callable[[str, Mapping[str, Any]], float]
NUMBER = re.compile("(?:(?<!\\d)[-\N{MINUS SIGN}])?\\d[\\d,]*(?:\\.\\d+)?")
GOLD_KEYS = ("answer", "solution", "target", "completion", "output")


def gold_answer(row: Mapping[str, Any]) -> str:
    """Return the row's right answer, under the first of `GOLD_KEYS` that it has."""
    for key in GOLD_KEYS:
        value = row.get(key)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            if not str(value).strip():
                raise InputError(f"{key}: expected the right answer, got an empty text")
            return str(value)
    raise InputError(f"row: expected a right answer under one of {', '.join(GOLD_KEYS)}, got none")


def exact(answer: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the answer is the right one, except for case and surrounding spaces."""
    return float(answer.strip().casefold() == gold_text(row))


def contains(answer: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the right answer occurs in the answer, in any case."""
    return float(gold_text(row) in answer.casefold())


def gold_text(row: Mapping[str, Any]) -> str:
    """Return the right answer without case and surrounding spaces."""
    return gold_answer(row).strip().casefold()


def number(answer: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the last numbers of the answer and the right answer are equal (GSM8K's rule)."""
    gold, value = gold_number(row), last_number(answer)
    return float(value is not None and math.isclose(value, gold, rel_tol=1e-6, abs_tol=1e-9))


def gold_number(row: Mapping[str, Any]) -> float:
    """Return the last number of the right answer."""
    value = last_number(gold_answer(row))
    if value is None:
        raise InputError(
            f"row: expected a number in the right answer, got {gold_answer(row)!r:.60}"
        )
    return value


def last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("\N{MINUS SIGN}", "-")) if numbers else None


VERIFIERS: dict[str, Reward] = {
    "exact": exact, "contains": contains, "number": number, SCHEME: score_reasoning_gym,
}  # fmt: skip
# what is equal in rows that the same answers are right for
ANSWER_KEYS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "exact": gold_text, "number": gold_number,
}  # fmt: skip
# check that a row has what the verifier reads; they raise InputError
CHECKS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "exact": gold_answer, "contains": gold_answer, "number": gold_number,
    SCHEME: check_reasoning_gym_row,
}  # fmt: skip


def constant_answer_score(name: str, rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the share of ``rows`` with the most frequent right answer: what an answer that is
    always the same scores at best. A model that only learns the form of answers may reach it.
    None: no rows, or ``name`` is not that of a function in `ANSWER_KEYS`.
    """
    key = ANSWER_KEYS.get(name)
    counts = Counter(map(key, rows)) if key is not None else Counter()
    return max(counts.values()) / counts.total() if counts else None


def load_reward(name: str) -> Reward:
    """Return the function that the option ``reward_function`` names.

    InputError: as `import_object`.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    return import_object("reward_function", name, VERIFIERS, "function")


def import_object(option: str, name: str, choices: Collection[str], noun: str) -> Any:
    """Import what ``option`` names by ``file.py:NAME`` or ``module:NAME``: a callable, for messages
    a ``noun``. ``choices``: what else the option accepts.

    InputError: an unknown name, a file or module that cannot be imported or lacks the object. A
    file is run as Python, like an import: name only one that you trust.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise InputError(
            f"{option}: expected one of {', '.join(choices)}, file.py:{noun} or module:{noun},"
            f" got {name!r}"
        )
    try:
        if module_name.endswith(".py"):
            module = _from_file(option, module_name)
        else:
            module = importlib.import_module(module_name)
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{option}: expected a module that can be imported, got {reason}"
        ) from None
    if not callable(getattr(module, attribute, None)):
        raise InputError(f"{option}: expected a {noun} {attribute} in {module_name}, got none")
    return getattr(module, attribute)


def _from_file(option: str, file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{option}: expected a file, got none at {path}")
    name = f"_fastlm_{option}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_reward(value: Any, location: str) -> float:
    """Return a reward as float. InputError, with its row: it is not a finite number."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(f"{location}: expected a finite reward, got {value!r:.60}")
    return result
