"""Small TOML files of the server, whose errors name the line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, unknown_key
from fastlm.schema import read_toml, validate


@dataclass(frozen=True)
class Table:
    """One table of a file. ``value``: an object of the class that its kind asks for."""

    path: str | Path
    value: Any
    lines: dict[str, int]  # by key; "": of its header

    def error(self, key: str, text: str) -> InputError:
        """What is wrong about a key, with its line."""
        line = self.lines.get(key, self.lines[""])
        return InputError(f"{self.path} line {line}: {f'{key}: ' if key else ''}{text}")


def read_tables(path: str | Path, kinds: Mapping[str, tuple[type, int]]) -> dict[str, list[Table]]:
    """The tables of a file by kind. ``kinds``: the dataclass of each `[[kind]]`, and how many there
    may be. If they have a name, each has another one.

    InputError, with the file's line: not TOML, an unknown table or key, a value that is refused.
    """
    parsed, text = read_toml(path)
    places = _places(text)
    found: dict[str, list[Table]] = {kind: [] for kind in kinds}
    for kind, tables in parsed.items():
        top = places.get(("", 0), {}).get(kind, 1)
        whole = Table(path, None, places.get((kind, 0), {"": top}))
        if kind not in kinds:
            raise whole.error("", unknown_key(kind, kind, kinds))
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise whole.error("", f"{kind}: expected [[{kind}]]")
        schema, most = kinds[kind]
        known = [field.name for field in fields(schema)]
        names: set[str] = set()
        for index, values in enumerate(tables):
            table = Table(path, None, places.get((kind, index), {"": top}))
            if index == most:
                raise table.error("", f"{kind}: expected at most {most}")
            for key, value in values.items():
                if key not in known:
                    raise table.error(key, unknown_key(key, key, known).removeprefix(f"{key}: "))
                if isinstance(value, float) and not math.isfinite(value):
                    raise table.error(key, f"expected a finite number, got {value}")
            try:
                table = replace(table, value=validate(values, schema, ""))
            except InputError as error:
                key, _, message = str(error).partition(": ")
                raise table.error(key.partition(".")[0], message) from None
            if "name" in known and (name := table.value.name) in names:
                raise table.error("name", f"expected each once, got {name!r} again")
            names.add(getattr(table.value, "name", ""))
            found[kind].append(table)
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
