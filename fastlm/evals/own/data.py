"""The rows of a task's data files: JSON lines, a JSON array, or CSV with a heading."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import InputError

MOST_BYTES = 2**30  # of a file: it is read whole
Rows = list[tuple[str, Mapping[str, Any]]]  # where a row stands, the row


def read_rows(path: Path, kind: str) -> Rows:
    """Read a file of the kind "json" or "csv". InputError names the line that is damaged."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: wanted at most {MOST_BYTES:,} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: wanted UTF-8 text: {error.reason}") from None
    rows = _csv(path, text) if kind == "csv" else _json(path, text)
    if not rows:
        raise InputError(f"{path}: wanted rows, got none")
    return rows


def _json(path: Path, text: str) -> Rows:
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            raise InputError(f"{path}, line {line}: wanted JSON, got: {error}") from None
        return [_row(f"{path}, row {i}", one) for i, one in enumerate(listed, 1)]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                rows.append(_row(where, json.loads(line)))
            except InputError:
                raise
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: wanted JSON lines, got: {error}") from None
    return rows


def _row(where: str, row: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: wanted an object, got {type(row).__name__}")
    return where, row


def _csv(path: Path, text: str) -> Rows:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True, restkey="")
    rows: Rows = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if "" in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise InputError(f"{where}: wanted {count} fields, got another number")
            rows.append((where, row))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: wanted CSV, got: {error}") from None
    return rows
