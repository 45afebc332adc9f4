"""Small TOML files of the server, whose errors name the line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, unknown_key
from fastlm.schema import read_toml, validate


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
    parsed, text = read_toml(path)
    places = _places(text)
    found: dict[str, list[Table]] = {kind: [] for kind in kinds}
    for kind, tables in parsed.items():
        top = places.get((kind, 0)) or {"": places["", 0].get(kind, 1)}
        wrong = None if kind in kinds else unknown_key(kind, kind, kinds)
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            wrong = wrong or f"{kind}: wanted [[{kind}]]"
        if wrong is not None:
            raise InputError(f"{path} line {top['']}: {wrong}")
        known = [field.name for field in fields(kinds[kind])]
        for index, table in enumerate(tables):
            lines = places.get((kind, index), top)
            try:
                for key, value in table.items():
                    if key not in known:
                        raise InputError(unknown_key(key, key, known))
                    if isinstance(value, float) and not math.isfinite(value):
                        raise InputError(f"{key}: expected a finite number, got {value}")
                found[kind].append(Table(validate(table, kinds[kind], ""), lines))
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
