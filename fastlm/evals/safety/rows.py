"""Rows of the files that sets are in. A damaged one is refused with its file and number."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_text


def json_lines(*paths: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and line, object) of JSON lines."""
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where}: wanted JSON, got {line[:60]!r}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: wanted a JSON object, got {line[:60]!r}")
            yield where, row


def csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield (file and line, row) of a CSV file; lines with # before the header are comments."""
    lines = read_text(path).removeprefix("\ufeff").splitlines(keepends=True)
    skipped = 0
    while skipped < len(lines) and lines[skipped].startswith(("#", '"#')):
        skipped += 1
    reader = csv.DictReader(io.StringIO("".join(lines[skipped:])))
    try:
        for row in reader:
            yield f"{path} line {skipped + reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path} line {skipped + reader.line_num}: {error}") from None


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text under ``key`` of the row at ``where``. InputError: none is there."""
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: wanted text under {key!r}, got {value!r:.60}")
    return value


def objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and item, object) of a JSON list of objects."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: wanted JSON, got something else") from None
    for i, row in enumerate(rows if isinstance(rows, list) else (rows,), 1):
        if not isinstance(row, dict):
            raise InputError(f"{path} item {i}: wanted a JSON object, got {row!r:.60}")
        yield f"{path} item {i}", row


def listed(path: Path) -> list[str]:
    """Return the texts of a JSON list."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: wanted JSON, got something else") from None
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise InputError(f"{path}: wanted a list of texts, got something else")
    return values
