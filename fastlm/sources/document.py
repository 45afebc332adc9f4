"""The documents and files that every reader shares, and the limits of untrusted input."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of one page, JSON line, WARC record or line of text. The longest book is 6 MB; anything larger is
# a dump or an attack.
MAX_DOCUMENT_BYTES = 16 << 20
MAX_REPORTED_ROWS = 3  # bad lines or records that are reported per file; all are counted

UNREADABLE, CUT_SHORT, BROKEN_RECORD = "file: unreadable", "file: cut short", "record: broken"
BROKEN_GROUP, OVERSIZE = "row group: unreadable", "page over the size limit"
# What readers count although a whole file would not have it; other reasons are choices
FAULTS = frozenset(
    {
        UNREADABLE, CUT_SHORT, BROKEN_RECORD, BROKEN_GROUP, OVERSIZE, "line: malformed",
        "element: malformed", "row: malformed", "policy over the size limit",
    }
)  # fmt: skip


@dataclass(slots=True)
class Document:
    """A text. ``meta["format"]`` is "html" while the text is still markup, else "text"."""

    text: str
    id: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. ``explicit``: the user named this file itself, so a fault in it is an
    error.
    """

    path: Path
    name: str  # relative to the source, with /; the first part of the documents' ids
    source: str
    format: str
    explicit: bool = False
    package: bool = False


@dataclass(frozen=True, slots=True)
class FileRange:
    """Items ``start`` to ``stop`` (excluded; None: to the end) of a file, counted from 0.

    Items are lines of JSON lines, elements of a JSON array, WARC records, rows of Parquet, pieces
    of a long text. ``offset``: where item ``start`` begins in the file, in bytes, or 0 if a reader
    has to start at the beginning and skip items.
    """

    start: int = 0
    stop: int | None = None
    offset: int = 0


WHOLE_FILE = FileRange()


def printable(path: str | Path) -> str:
    """Return a name in UTF-8; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def ignore_message(message: str) -> None:
    """Do nothing: the default of ``on_skip`` does not report skipped items."""


def decode_web(data: bytes, *, html: bool) -> str:
    """Decode bytes of unknown encoding: as UTF-8 if valid, else by the page's declaration or a
    guess from the bytes.

    Never raises: bytes that fit no encoding become U+FFFD.
    """
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = detect_encoding(data, from_html_meta=html) or "utf-8"
    try:
        return bytes_to_str(data, encoding, errors="replace")
    except (LookupError, UnicodeError):
        return data.decode("utf-8", errors="replace")
