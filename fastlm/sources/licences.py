"""Read the licence that a source of text states, from its package in the cache."""

import re
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.sources.packages import fetch
from fastlm.sources.reasoning_gym import SCHEME, is_reasoning_gym
from fastlm.sources.source_files import parse_source

MAX_BYTES = 1 << 20  # read of a file
MAX_LENGTH = 200  # characters: some packages put the full text of a licence into one field


def read_licence(spec: str, cache: Path) -> tuple[str | None, str | None]:
    """Return (package with its version, licence) of a source; None for unstated values and for
    local files. A package that is not in the cache is fetched.
    """
    if is_reasoning_gym(spec):
        try:
            return SCHEME, _stated_licence(metadata(SCHEME))
        except PackageNotFoundError:
            return SCHEME, None
    scheme, name, *_ = parse_source(spec)
    if not scheme:
        return None, None
    try:
        folder = fetch(scheme, name, cache=cache)
    except InputError:
        return None, None
    return folder.name, _debian_licence(folder) if scheme == "deb" else _python_licence(folder)


def _python_licence(folder: Path) -> str | None:
    """Return the licence that a wheel's METADATA or a source archive's PKG-INFO states."""
    patterns = ("*.dist-info/METADATA", "PKG-INFO", "*/PKG-INFO")
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    licences = (_stated_licence(HeaderParser().parsestr(_head(file))) for file in files)
    return next((licence for licence in licences if licence), None)


def _stated_licence(fields: Any) -> str | None:
    for key in ("License-Expression", "License"):
        for value in fields.get_all(key) or ():
            line = " ".join(value.split())
            if line and line.upper() != "UNKNOWN":
                return line[:MAX_LENGTH]
    classifiers = fields.get_all("Classifier") or ()
    names = [name.rpartition(" :: ")[2] for name in classifiers if "License ::" in name]
    return ", ".join(names) or None


def _debian_licence(folder: Path) -> str | None:
    """Return the names in the machine-readable form of debian/copyright."""
    names: dict[str, None] = {}
    for file in sorted(folder.glob("usr/share/doc/*/copyright")):
        names |= dict.fromkeys(re.findall(r"^License: *(\S.*?)\s*$", _head(file), re.MULTILINE))
    return ", ".join(names)[:MAX_LENGTH] or None


def _head(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
