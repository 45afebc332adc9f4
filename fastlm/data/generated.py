"""Prompts that a program makes: the generators of the package reasoning-gym, which also score the
answers.

``reasoning-gym:NAME[?KEY=VALUE&...]`` names a generator and the options of its configuration, as
``reasoning-gym:chain_sum?size=2000&seed=1&max_digits=2``. A value is JSON, or else a text. The
defaults are the package's (``size=500``), but for the seed, which is 0: the same source always
gives the same rows. A row is the package's entry: ``{"question", "answer", "metadata"}``.

Nothing is fetched. The package is imported where such a source is read.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

from fastlm.errors import InputError
from fastlm.typed import unknown

SCHEME = "reasoning-gym"
FORM = f"{SCHEME}:NAME or {SCHEME}:NAME?KEY=VALUE&..."
SOURCE = "source"  # the key of a row that holds its spec
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MISSING = f"wanted the package {SCHEME}, which is not installed (pip install {SCHEME})"


def is_generated(spec: str) -> bool:
    """Whether a source names a generator."""
    return spec.startswith(f"{SCHEME}:")


def package_version() -> str:
    """The version of reasoning-gym, on which rows depend. InputError: it is not installed."""
    try:
        return metadata.version(SCHEME)
    except metadata.PackageNotFoundError:
        raise InputError(MISSING) from None


def generated_rows(spec: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a generator. InputError: an unknown generator or option, a value that the
    generator refuses, the package is missing.
    """
    made = _generator(spec)
    for i in range(len(made)):
        try:
            entry = made[i]
        except Exception as error:
            raise _refused(spec, error) from None
        yield {**entry, SOURCE: spec}


def check_generated(row: Mapping[str, Any]) -> None:
    """InputError unless the row is one of reasoning-gym's."""
    _generator(_spec_of(row))


def generator_score(answer: str, row: Mapping[str, Any]) -> float:
    """What the row's generator gives for an answer, mostly 0 to 1. An answer is what stands in its
    last ``<answer>`` tag; without one, the whole text.
    """
    tagged = TAGGED.findall(answer)
    given = (tagged[-1] if tagged else answer).strip()
    entry = {key: value for key, value in row.items() if key != SOURCE}
    return float(_generator(_spec_of(row)).score_answer(given, entry))


def _spec_of(row: Mapping[str, Any]) -> str:
    if is_generated(str(row.get(SOURCE))):
        return row[SOURCE]
    about = row.get("metadata")  # an entry that was written to a file: the default configuration
    name = about.get("source_dataset") if isinstance(about, Mapping) else None
    if not isinstance(name, str):
        raise InputError(f"row: wanted one of a {SCHEME}: source, got one without its generator")
    return f"{SCHEME}:{name}"


@lru_cache(maxsize=64)
def _generator(spec: str) -> Any:
    """The data set of a spec: it has a length, rows by their index, and ``score_answer``."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("reasoning_gym"):
            raise InputError(f"source {spec}: {SCHEME} lacks the package {error.name}") from None
        raise InputError(f"source {spec}: {MISSING}") from None

    name, _, query = spec.removeprefix(f"{SCHEME}:").partition("?")
    if name not in DATASETS:
        near = difflib.get_close_matches(name[:80], DATASETS, n=1, cutoff=0.0)[0]
        raise InputError(f"source {spec}: wanted a generator such as {near}, got {name!r:.80}")
    known = {f.name for f in dataclasses.fields(DATASETS[name][1])}
    options: dict[str, Any] = {"seed": 0} if "seed" in known else {}
    for part in query.split("&") if query else ():
        key, equals, text = part.partition("=")
        if not equals:
            raise InputError(f"source {spec}: wanted {FORM}, got {part!r:.60}")
        if key not in known:
            raise InputError(unknown(f"source {spec}: {key}", key, known))
        options[key] = _value(text)
    try:
        return create_dataset(name, **options)
    except Exception as error:
        raise _refused(spec, error) from None


def _refused(spec: str, error: Exception) -> InputError:
    """The package asserts, and a value of another type fails anyhow."""
    told = f"{type(error).__name__}: {error}"
    return InputError(f"source {spec}: wanted options that the generator accepts, got {told:.200}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
