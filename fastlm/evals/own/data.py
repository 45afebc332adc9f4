"""The rows of a task's data files: JSON lines, a JSON array, or CSV with a heading."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import open_regular, reason
from fastlm.schema import parse

MAX_BYTES = 2**30  # of a file: it is read whole
Row = dict[str, Any]
Rows = list[tuple[str, Mapping[str, Any]]]  # file and line (of an array: row), the row


def read_rows(path: Path, kind: str) -> Rows:
    """Read a file of the kind "json" or "csv". InputError names the line that is damaged."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{path}: expected at most {MAX_BYTES:,} bytes, got more")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {reason(error)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: expected UTF-8, got: {error.reason}") from None
    rows = _csv(path, text) if kind == "csv" else _json(path, text)
    if not rows:
        raise InputError(f"{path}: expected rows, got none")
    return rows


def _json(path: Path, text: str) -> Rows:
    if text.lstrip().startswith("["):
        rows = parse(text, list[Row], str(path))
        return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]
    return [
        (where := f"{path}:{number}", parse(line, Row, where))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _csv(path: Path, text: str) -> Rows:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True, restkey="")
    rows: Rows = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if "" in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise InputError(f"{where}: expected {count} fields, got another number")
            rows.append((where, row))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: expected CSV, got: {error}") from None
    return rows
