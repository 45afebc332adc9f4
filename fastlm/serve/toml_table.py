"""Read small TOML files of the server, with errors that name the line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, unknown_key
from fastlm.schema import read_toml, validate


@dataclass(frozen=True)
class TomlTable:
    """One table of a file. ``value``: an object of the dataclass of its kind."""

    path: str | Path
    value: Any
    lines: dict[str, int]  # by key; "": of its header

    def error(self, key: str, text: str) -> InputError:
        """Return an error about a key, with its line."""
        line = self.lines.get(key, self.lines[""])
        return InputError(f"{self.path} line {line}: {f'{key}: ' if key else ''}{text}")


def read_tables(
    path: str | Path, kinds: Mapping[str, tuple[type, int]]
) -> dict[str, list[TomlTable]]:
    """The tables of a file by kind. ``kinds``: the dataclass of each `[[kind]]`, and how many there
    may be. If they have a name, each has another one.

    InputError, with the file's line: not TOML, an unknown table or key, an invalid value.
    """
    parsed, text = read_toml(path)
    lines = _key_lines(text)
    result: dict[str, list[TomlTable]] = {kind: [] for kind in kinds}
    for kind, tables in parsed.items():
        top = lines.get(("", 0), {}).get(kind, 1)
        first = TomlTable(path, None, lines.get((kind, 0), {"": top}))
        if kind not in kinds:
            raise first.error("", unknown_key(kind, kind, kinds))
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise first.error("", f"{kind}: expected [[{kind}]]")
        schema, max_tables = kinds[kind]
        keys = [field.name for field in fields(schema)]
        names: set[str] = set()
        for index, values in enumerate(tables):
            table = TomlTable(path, None, lines.get((kind, index), {"": top}))
            if index == max_tables:
                raise table.error("", f"{kind}: expected at most {max_tables}")
            for key, value in values.items():
                if key not in keys:
                    raise table.error(key, unknown_key(key, key, keys).removeprefix(f"{key}: "))
                if isinstance(value, float) and not math.isfinite(value):
                    raise table.error(key, f"expected a finite number, got {value}")
            try:
                table = replace(table, value=validate(values, schema, ""))
            except InputError as error:
                key, _, message = str(error).partition(": ")
                raise table.error(key.partition(".")[0], message) from None
            if "name" in keys and (name := table.value.name) in names:
                raise table.error("name", f"expected each once, got {name!r} again")
            names.add(getattr(table.value, "name", ""))
            result[kind].append(table)
    return result


def _key_lines(text: str) -> dict[tuple[str, int], dict[str, int]]:
    """Return the line of each key of each table, by (name of the table, its number from 0)."""
    lines: dict[tuple[str, int], dict[str, int]] = {("", 0): {"": 1}}
    table = ("", 0)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            name = line.partition("]")[0].strip("[ \"'")
            table = (name, sum(1 for other, _ in lines if other == name))
            lines[table] = {"": number}
        elif "=" in line and not line.startswith("#"):
            lines[table].setdefault(line.partition("=")[0].strip(" \"'"), number)
    return lines
