"""Rows of the files that sets are in. A damaged one is refused with its file and line."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.schema import read_document, read_lines

Row = Mapping[str, Any]


def json_lines(*paths: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file and line, object) of JSON lines."""
    for path in paths:
        for number, row in read_lines(path, dict[str, Any]):
            yield f"{path}:{number}", row


def csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield (file and line, row) of a CSV file; lines with # before the header are comments."""
    lines = read_text(path).removeprefix("\ufeff").splitlines(keepends=True)
    skipped = 0
    while skipped < len(lines) and lines[skipped].startswith(("#", '"#')):
        skipped += 1
    reader = csv.DictReader(io.StringIO("".join(lines[skipped:])))
    try:
        for row in reader:
            yield f"{path}:{skipped + reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}:{skipped + reader.line_num}: {error}") from None


def text_of(row: Row, key: str, where: str) -> str:
    """Return the text under ``key`` of the row at ``where``. InputError: none is there."""
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key}: expected text, got {value!r:.60}")
    return value


def objects(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file and item, object) of a JSON list of objects."""
    for i, row in enumerate(read_document(path, list[dict[str, Any]])):
        yield f"{path}[{i}]", row
