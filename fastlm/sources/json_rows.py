"""Read rows of JSON: the lines of JSON lines, and the elements of a JSON array.

Lines are found before they are parsed, so a range of lines costs the parsing of that range alone:
plain files are read from an offset, compressed ones are decompressed up to it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, TypeVar

from fastlm.errors import InputError
from fastlm.sources.document import (
    MAX_DOCUMENT_BYTES,
    MAX_REPORTED_ROWS,
    WHOLE_FILE,
    Document,
    FileRange,
    SourceFile,
    ignore_message,
)
from fastlm.sources.streams import open_stream

# One JSON value or notebook, parsed whole; a larger collection has to be JSON lines.
MAX_JSON_BYTES = 128 << 20
MAX_META_LEVELS = 64  # deeper values, near the recursion limit, might fail to be written

T = TypeVar("T")
Row = tuple[int, Any]  # (number from 1, value or an InputError with the reason)


def read_rows(
    file: SourceFile, range: FileRange = WHOLE_FILE, *, partial: bool = False
) -> Iterator[Row]:
    """Yield the rows of a file of format "jsonl" (its lines that are not blank) or "json" (the
    elements of its array): (number from 1, value, or an InputError with the reason why the row is
    not JSON).

    ``range`` selects lines or elements. ``partial``: yield the rows of a file that is cut short
    before the error is raised.
    """
    if file.format == "jsonl":
        with open_stream(file.path, offset=range.offset, partial=partial) as stream:
            yield from _json_lines(stream, range)
        return
    with open_stream(file.path) as stream:
        value = read_json(file, stream)
    rows = enumerate(value if isinstance(value, list) else [value], 1)
    yield from islice(rows, range.start, range.stop)


def row_unit(file: SourceFile) -> str:
    """Return the unit of the numbers of `read_rows`."""
    return {"jsonl": "line", "json": "element"}.get(file.format, "row")


def _json_lines(stream: BinaryIO, range: FileRange) -> Iterator[Row]:
    """Yield every line that is not blank."""
    line = range.start if range.offset else 0
    while (range.stop is None or line < range.stop) and (
        data := stream.readline(MAX_DOCUMENT_BYTES + 1)
    ):
        line += 1
        too_long = len(data) > MAX_DOCUMENT_BYTES
        while too_long and data and not data.endswith(b"\n"):
            data = stream.readline(MAX_DOCUMENT_BYTES)
        if line <= range.start:
            continue
        if too_long:
            limit = f"expected lines of at most {MAX_DOCUMENT_BYTES:,} bytes, this one is longer"
            yield line, InputError(limit)
        elif data.strip():
            yield line, _parse_json(data, "utf-8-sig" if line == 1 else "utf-8")


def read_json(file: SourceFile, stream: BinaryIO) -> Any:
    """Return the one JSON value of a file. InputError: too large, or not JSON."""
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InputError(
            f"{file.path}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, or JSON lines "
            "(.jsonl)"
        )
    value = _parse_json(data, "utf-8-sig")
    if isinstance(value, InputError):
        raise InputError(f"{file.path}: {value}")
    return value


def _parse_json(data: bytes, encoding: str) -> Any:
    """Return the JSON value, or an InputError with the reason why it is not one."""
    try:
        return json.loads(data.decode(encoding))
    except UnicodeDecodeError as e:
        return InputError(f"expected UTF-8, got byte 0x{data[e.start]:02x}")
    except json.JSONDecodeError as e:
        at = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        return InputError(f"expected one JSON object: {e.msg} at {at}")
    except (ValueError, RecursionError) as e:
        return InputError(f"expected one JSON object: {e}")


def parse_rows(
    rows: Iterable[Row],
    parse: Callable[[Any, str], T],
    name: str,
    unit: str,
    *,
    counts: Counter[str],
    reason: str,
    on_skip: Callable[[str], None] = ignore_message,
    skip_bad: bool = True,
    required: bool = True,
) -> Iterator[T]:
    """Yield ``parse(value, location)`` of each row; the location is ``name``, ``unit`` and number.

    ``parse`` raises InputError for a row that cannot be used. Such rows are counted as ``reason``
    and left out, and the first ones are reported. Without ``skip_bad`` the first one is raised,
    with its location. InputError: also if no row is good although one is ``required``.
    """
    good, bad, messages = 0, 0, []
    try:
        for number, row in rows:
            location = f"{name}, {unit} {number}"
            try:
                if isinstance(row, InputError):
                    raise row
                example = parse(row, location)
            except InputError as error:
                if not skip_bad:
                    raise InputError(f"{location}: {error}") from None
                bad += 1
                if bad <= MAX_REPORTED_ROWS:
                    messages.append(f"{location}: {error}")
            else:
                good += 1
                yield example
        if bad and not good and required:
            raise InputError(messages[0])
    finally:
        if bad and (good or not required):
            counts[reason] += bad
            for message in messages:
                on_skip(message)
            if bad > len(messages):
                on_skip(f"{name}: {bad - len(messages):,} more of its {good + bad:,} {unit}s")


def parse_document(row: Any, location: str, file: SourceFile, field: str) -> Document:
    """Return the document of a JSON row. InputError: the row has no text in ``field``."""
    if isinstance(row, str) and file.format == "json":
        row = {field: row}
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        got = type(row).__name__
        if isinstance(row, dict):
            got = f"the fields {', '.join(map(repr, row))[:200]}"
            if field in row:
                got = f"{type(row[field]).__name__} there"
        raise InputError(f"expected an object with a text in {field!r}, got {got}")
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    if _is_deeper(meta, MAX_META_LEVELS):
        raise InputError(f"expected a meta of at most {MAX_META_LEVELS} levels, got more")
    if isinstance(row.get("url"), str):
        meta = {"url": row["url"], **meta}
    # A lone surrogate is legal JSON but not legal text: it could not be written again.
    text = row[field].encode("utf-8", "replace").decode()
    id = f"{file.name}:{location.rpartition(' ')[2]}"
    return Document(text, id, file.source, {"format": "text", **meta})


def _is_deeper(value: Any, levels: int) -> bool:
    """Return True if a JSON value has more than ``levels`` levels."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(v, levels - 1) for v in inner)
