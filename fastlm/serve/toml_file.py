"""Small TOML files of the server, whose errors name the line."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.typed import build, unknown

MOST_BYTES = 2**18


@dataclass(frozen=True)
class Table:
    """One table of a file. ``value``: an object of the class that its kind asks for."""

    value: Any
    lines: dict[str, int]  # by key; "": of its header

    def line(self, key: str) -> int:
        return self.lines.get(key, self.lines[""])


def read_tables(path: str | Path, kinds: Mapping[str, type]) -> dict[str, list[Table]]:
    """The tables of a file by kind: any number of `[[kind]]`. ``kinds``: the dataclass of each.

    InputError, with the file's line: not TOML, an unknown table or key, a value that is refused.
    """
    text = read_text(path, MOST_BYTES)
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > 1000:  # tomllib takes time quadratic in the parts of a key
            raise InputError(f"{path} line {number}: wanted fewer dots, got over 1,000")
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's names line and column
        raise InputError(f"{path}: wanted TOML, got: {' '.join(str(error).split()):.200}") from None
    places = _places(text)
    found: dict[str, list[Table]] = {kind: [] for kind in kinds}
    for kind, tables in parsed.items():
        top = places.get((kind, 0), places.get(("", 0), {})).get(kind, 1)
        if kind not in kinds:
            line = places.get((kind, 0), {"": top})[""]
            raise InputError(f"{path} line {line}: {unknown(kind, kind, kinds)}")
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            line = places.get((kind, 0), {"": top})[""]
            raise InputError(f"{path} line {line}: {kind}: wanted [[{kind}]]")
        for index, table in enumerate(tables):
            lines = places.get((kind, index), {"": top})
            try:
                found[kind].append(Table(build(kinds[kind], table), lines))
            except InputError as error:
                key = str(error).partition(":")[0].partition(".")[0]
                line = lines.get(key, lines[""])
                raise InputError(f"{path} line {line}: {error}") from None
    return found


def _places(text: str) -> dict[tuple[str, int], dict[str, int]]:
    """The line of each key of each table, by (name of the table, its number from 0)."""
    found: dict[tuple[str, int], dict[str, int]] = {("", 0): {"": 1}}
    at = ("", 0)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            name = line.partition("]")[0].strip("[ \"'")
            at = (name, sum(1 for known, _ in found if known == name))
            found[at] = {"": number}
        elif "=" in line and not line.startswith("#"):
            found[at].setdefault(line.partition("=")[0].strip(" \"'"), number)
    return found
