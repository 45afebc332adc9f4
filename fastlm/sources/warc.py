"""Read WARC archives: pages as documents, and policy files (robots.txt and its like) apart.

fastwarc parses the records. It stops at the first one that is broken, so this module finds the next
record and starts it again there: at the next line ``WARC/1.x``, or at the next gzip member if the
compressed data itself is broken. A record counts as whole once the header of the next one was
parsed, or the file ends after it.

GNU wget 1.25 writes addresses in angle brackets, and its arguments and log as records of their own.

Rejected: fastwarc on the compressed file (it takes a member that is cut short for the end of the
file, without an error); its ``verify_digests``, which drops every record that has no digest.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

import zstandard

from fastlm.errors import InputError
from fastlm.sources.document import (
    BROKEN_RECORD,
    CUT_SHORT,
    MAX_DOCUMENT_BYTES,
    MAX_REPORTED_ROWS,
    OVERSIZE,
    WHOLE_FILE,
    Document,
    FileRange,
    SourceFile,
    decode_web,
    ignore_message,
)
from fastlm.sources.streams import GZIP_MAGIC, ZSTD_MAGIC, GzipMembers, decompressed

PAGE_FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}
NO_PAGE, POLICY_RECORD = "record that is no page", "policy record"
LONG_POLICY = "policy over the size limit"
MAX_POLICY_BYTES = 512 << 10  # RFC 9309 asks for at least 500 KiB
MAX_POLICIES_BYTES = 256 << 20  # of one file; more is an attack
# HTTP headers and the frames of a chunked body around the largest page
MAX_BLOCK_BYTES = MAX_DOCUMENT_BYTES + (1 << 20)
MAX_HEADER_BYTES = 64 << 10  # fastwarc's own limit for a record header
MAX_BROKEN = 10_000  # of one file; each costs a search for the next record
MAX_REWINDS = 16  # broken records of a file that is decompressed from its start each time
RECORD_START = re.compile(rb"WARC/1\.\d\r\n[\w-]+:")
RECORD_START_BYTES = 80  # kept of a window, so that a start is found across two
RECORD_END = b"\r\n\r\n"
SEARCH_BYTES = 1 << 16
PARSE_ERRORS = (OSError, ValueError, RuntimeError, EOFError, zlib.error, zstandard.ZstdError)

POLICY_PATHS = {"/robots.txt", "/ai.txt", "/.well-known/ai.txt", "/.well-known/tdmrep.json"}
POLICY_NAMES = {"tdmrep.json"}
# a licence (RSL) has any address; its content decides
LICENCE_NAME = re.compile(r"\.xml$|rsl|licen[cs]e", re.IGNORECASE)
RSL_NAMESPACE = "rslstandard.org/rsl"

# Response headers that say what a page is and what may be done with it. The rest may be personal
# (cookies, addresses, request numbers) and is of no use later.
PAGE_HEADERS = {
    "age", "cache-control", "content-disposition", "content-language", "content-location",
    "content-signal", "content-type", "content-usage", "date", "etag", "expires", "last-modified",
    "license", "link", "location", "retry-after", "server", "tdm-policy", "tdm-reservation",
    "x-robots-tag",
}  # fmt: skip
MAX_HEADER_VALUE = 8 << 10  # characters

Position = tuple[int, int]  # (byte of the file, decompressed bytes to skip from there)


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A file of a site that says how its pages may be used: robots.txt, tdmrep.json, ai.txt, a
    licence. ``date``: of the fetch, ISO 8601, "" if unknown. ``status``: of HTTP, also 404 and 5xx.
    """

    url: str
    date: str
    status: int
    text: str


class _Record(NamedTuple):
    """A record that was read, but is not known to be whole yet."""

    position: Position
    is_complete: bool  # as many bytes as it declares
    value: Any


class RecordItem(NamedTuple):
    """A whole record: its number in the file, its position and what the caller made of it."""

    index: int
    position: Position
    value: Any


# (record number, fastwarc's record) -> True if the record's block is needed
Selection = Callable[[int, Any], bool]
Fault = Callable[[int, str, str], None]  # (number of the record before it, reason, message)


def target_uri(record: Any) -> str:
    """Return the address of a record, without the angle brackets that wget writes around it."""
    uri = (record.headers.get("WARC-Target-URI") or "").strip()
    return uri[1:-1] if uri.startswith("<") and uri.endswith(">") else uri


def read_warc(
    file: SourceFile,
    range: FileRange = WHOLE_FILE,
    *,
    skipped: Counter[str],
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Document]:
    """Yield the pages among the records of ``range``. ``skipped`` counts the other records.

    ``meta`` of a page: url, format, date (of the record) and headers (`page_headers`). Broken
    records are counted and reported; the first ones are named. InputError: no WARC archive, or a
    whole file without a single good record.
    """
    stop = float("inf") if range.stop is None else range.stop
    faults = 0
    messages: list[str] = []

    def select(index: int, record: Any) -> bool:
        return range.start <= index < stop and _may_be_page(record)

    def parse(index: int, record: Any) -> Document | str | None:
        return _page(file, record) if range.start <= index < stop else None

    def count_fault(before: int, reason: str, message: str) -> None:
        nonlocal faults
        if range.start <= max(before, 0) < stop:
            faults += 1
            skipped[reason] += 1
            if len(messages) < MAX_REPORTED_ROWS:
                messages.append(message)
                on_skip(message)

    records = 0
    with open(file.path, "rb") as raw:
        # the record after the range is read as well: whether the last one is whole depends on it
        for item in walk_records(file, raw, range, select, parse, count_fault):
            if item.index >= stop:
                break
            if item.index < range.start:
                continue
            records += 1
            if isinstance(item.value, Document):
                yield item.value
            else:
                skipped[item.value or NO_PAGE] += 1
    if faults and not records and range == WHOLE_FILE:
        raise InputError(messages[0])
    if faults > len(messages):
        on_skip(f"{file.path}: {faults - len(messages):,} more broken records")


def read_policies(
    file: SourceFile, raw: Any, skipped: Counter[str]
) -> Iterator[tuple[RecordItem, int]]:
    """Walk all records of an archive: yield (item, bytes of its block), where the item's value is a
    `PolicyFile` or None. Broken records are passed over: `read_warc` counts them.
    """
    size = total = 0

    def select(index: int, record: Any) -> bool:
        nonlocal size
        size = record.content_length
        return _may_be_policy(record)

    def parse(index: int, record: Any) -> PolicyFile | None:
        return _policy(record, skipped)

    for item in walk_records(file, raw, WHOLE_FILE, select, parse, lambda *_: None):
        if isinstance(item.value, PolicyFile):
            total += len(item.value.text)
            if total > MAX_POLICIES_BYTES:
                skipped[LONG_POLICY] += 1
                item = item._replace(value=None)
        yield item, size


def walk_records(
    file: SourceFile,
    raw: Any,
    range: FileRange,
    select: Selection,
    parse: Callable[[int, Any], Any],
    fault: Fault,
) -> Iterator[RecordItem]:
    """Yield the whole records of an archive, from ``range.offset``; ``range.stop`` is not obeyed.

    ``raw``: the file, with peek and seek. ``parse`` receives the records that ``select`` selects,
    with their block in memory; the value of the others is None. ``fault`` receives each break.
    InputError: the file is no WARC archive.
    """
    from fastwarc.warc import ArchiveIterator

    index = range.start if range.offset else 0
    position: Position | None = (range.offset, 0)
    broken = 0
    while position is not None:
        candidate, error = None, None
        stream = None
        try:
            stream = _open(raw, position)
            for record in ArchiveIterator(
                cast(BinaryIO, stream), parse_http=False, fsspec_args=False, stream_detect=False
            ):
                if candidate is not None:
                    yield RecordItem(index, candidate.position, candidate.value)
                    candidate, index = None, index + 1
                origin = stream.locate(record.stream_pos)
                length, value = record.content_length, None
                candidate = _Record(origin, False, None)  # if its block cannot be read
                if select(index, record):
                    record.freeze()
                    size = record.content_length
                    value = parse(index, record) if size == length else None
                else:
                    size = record.reader.consume() if record.reader else 0
                candidate = _Record(origin, size == length, value)
        except PARSE_ERRORS as e:
            if isinstance(e, OSError) and e.errno:
                raise
            error = e
        if error is None and stream is not None:
            if candidate is not None and candidate.is_complete and stream.tail == RECORD_END:
                yield RecordItem(index, candidate.position, candidate.value)
                return
            if candidate is None and (index or position != (0, 0)):
                return
        if candidate is None and position == (0, 0) and stream is not None:
            if stream.first != b"WARC/" and (stream.first or error is None):
                raise InputError(
                    f"{file.path}: expected a WARC archive, it does not start with WARC/"
                )
        origin = candidate.position if candidate is not None else position
        end = _record_end(raw, origin) if candidate is not None and error is not None else None
        broken += 1
        is_eof = isinstance(error, EOFError)
        position = None if is_eof and end else _next_record(raw, origin, end or 1)
        if broken > (MAX_REWINDS if position is not None and position[1] else MAX_BROKEN):
            position = None
        is_cut = position is None and (error is None or is_eof)
        what = "its last record is cut short" if is_cut else error or "its length is wrong"
        message = f"{file.path}, byte {origin[0]:,}: expected a whole WARC archive, {what}"
        if end is None:
            candidate = None
        fault(index - (candidate is None), CUT_SHORT if is_cut else BROKEN_RECORD, message)
        if candidate is not None:
            yield RecordItem(index, candidate.position, candidate.value)
            index += 1


class _Stream:
    """The decompressed bytes of an archive from a position. ``tail``: the last four that were read;
    ``first``: the first five.
    """

    def __init__(self, inner: Any, locate: Callable[[int], Position]):
        self._inner, self.locate = inner, locate
        self.tail = self.first = b""
        self.tell = inner.tell

    def read(self, size: int = -1) -> bytes:
        data = self._inner.read(size)
        if len(self.first) < 5:
            self.first = (self.first + data[:5])[:5]
        self.tail = (self.tail + data[-4:])[-4:]
        return data


class _PlainFile:
    """A file that is not compressed; positions count from ``offset``."""

    def __init__(self, raw: Any, offset: int):
        raw.seek(offset)
        self._raw, self._offset, self.read = raw, offset, raw.read

    def tell(self) -> int:
        return self._raw.tell() - self._offset


def _open(raw: Any, position: Position) -> _Stream:
    offset, skip = position
    raw.seek(0)
    magic = raw.peek(4)[:4]
    if magic.startswith(GZIP_MAGIC):
        members = GzipMembers(raw, offset)
        stream = _Stream(members, members.locate)
    elif magic == ZSTD_MAGIC:
        stream = _Stream(decompressed(raw, partial=True), lambda p: (0, p))
    else:
        stream = _Stream(_PlainFile(raw, offset), lambda p: (offset + p, 0))
    _skip(stream, skip)
    stream.first = b""
    return stream


def _skip(stream: _Stream, size: int) -> None:
    while size > 0 and (data := stream.read(min(size, SEARCH_BYTES))):
        size -= len(data)


def _record_end(raw: Any, position: Position) -> int | None:
    """Return the length of a record with its two line breaks, or None if they are not there."""
    try:
        stream = _open(raw, position)
        head = b""
        while RECORD_END not in head and len(head) < MAX_HEADER_BYTES:
            if not (data := stream.read(4096)):
                return None
            head += data
        header, _, rest = head.partition(RECORD_END)
        length = re.search(rb"\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r", header + b"\r", re.I)
        if not length:
            return None
        remaining = int(length[1]) + 4
        tail = rest[:remaining]
        remaining -= len(tail)
        while remaining and (data := stream.read(min(remaining, SEARCH_BYTES))):
            remaining -= len(data)
            tail = (tail[-4:] + data)[-4:]
        if remaining or tail[-4:] != RECORD_END:
            return None
        return len(header) + 4 + int(length[1]) + 4
    except PARSE_ERRORS:
        return None


def _next_record(raw: Any, position: Position, skip: int) -> Position | None:
    """Return where the next record starts, ``skip`` bytes or more after ``position``."""
    stream = _open(raw, (position[0], 0))
    offset, window = position[1] + skip, b""
    try:
        _skip(stream, offset)
        while data := stream.read(SEARCH_BYTES):
            window += data
            if match := RECORD_START.search(window):
                return stream.locate(offset + match.start())
            cut = max(len(window) - RECORD_START_BYTES, 0)
            offset, window = offset + cut, window[cut:]
    except PARSE_ERRORS as e:
        if isinstance(e, EOFError):
            return None
        member, _ = stream.locate(stream.tell())
        return _next_member(raw, member + 1)
    return None


def _next_member(raw: Any, offset: int) -> Position | None:
    """Return where the next gzip member starts that holds a record, at ``offset`` or later."""
    raw.seek(offset)
    window = b""
    while data := raw.read(SEARCH_BYTES):
        window += data
        for match in re.finditer(re.escape(GZIP_MAGIC + b"\x08"), window):
            start = offset + match.start()
            try:
                first = _open(raw, (start, 0)).read(5)
            except PARSE_ERRORS:
                continue
            if first == b"WARC/":
                return start, 0
        offset, window = offset + len(window) - 2, window[-2:]
        raw.seek(offset + 2)
    return None


def _kind(record: Any) -> str:
    """Return the media type of a page. The HTTP headers must have been parsed."""
    kind = record.http_content_type or record.headers.get("Content-Type") or ""
    return kind.partition(";")[0].strip().lower()


def _may_be_page(record: Any) -> bool:
    """Return True if the block of a record has to be read to know."""
    from fastwarc.warc import WarcRecordType

    types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    return bool(record.record_type & types) and record.content_length <= MAX_BLOCK_BYTES


def _is_policy_url(url: str) -> bool:
    path = _path(url)
    return path in POLICY_PATHS or path.rpartition("/")[2] in POLICY_NAMES


def _path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError:  # such as a bracket that is not closed
        return ""


def _may_be_policy(record: Any) -> bool:
    url = target_uri(record)
    is_candidate = _is_policy_url(url) or LICENCE_NAME.search(_path(url).rpartition("/")[2])
    return bool(is_candidate) and _may_be_page(record)


def _page(file: SourceFile, record: Any) -> Document | str:
    """Return the page of a record, or the reason why it is none."""
    url = target_uri(record)
    if _is_policy_url(url):
        return POLICY_RECORD
    if url.startswith("metadata:"):  # wget's arguments and log
        return NO_PAGE
    try:
        record.parse_http(auto_decode="all")
        kind = PAGE_FORMATS.get(_kind(record))
        status = record.http_headers.status_code if record.http_headers else 200
        if kind is None or status != 200:
            return NO_PAGE
        data = record.reader.read(MAX_DOCUMENT_BYTES + 1)
    except PARSE_ERRORS:
        return BROKEN_RECORD
    if len(data) > MAX_DOCUMENT_BYTES:
        return OVERSIZE
    meta: dict[str, Any] = {"format": kind, "url": url}
    if date := record.headers.get("WARC-Date"):
        meta["date"] = date
    if record.http_headers and (headers := page_headers(record.http_headers.items())):
        meta["headers"] = headers
    id = f"{file.name}:{record.record_id or url}"
    return Document(decode_web(data, html=kind == "html"), id, file.source, meta)


def _policy(record: Any, skipped: Counter[str]) -> PolicyFile | None:
    """Return the policy file of a record, None if it is none."""
    url = target_uri(record)
    try:
        record.parse_http(auto_decode="all")
        status = record.http_headers.status_code if record.http_headers else 200
        data = record.reader.read(MAX_POLICY_BYTES + 1)
    except PARSE_ERRORS:
        skipped[BROKEN_RECORD] += 1
        return None
    text = decode_web(data[:MAX_POLICY_BYTES], html=False)
    if not _is_policy_url(url):
        is_licence = _kind(record) == "application/rsl+xml" or (
            _kind(record).endswith("xml") and RSL_NAMESPACE in text
        )
        if not is_licence:
            return None
    if len(data) > MAX_POLICY_BYTES:
        skipped[LONG_POLICY] += 1
    return PolicyFile(url, record.headers.get("WARC-Date") or "", status or 0, text)


def page_headers(items: Any) -> dict[str, str]:
    """Return the headers of PAGE_HEADERS, in lower case; repeated ones are joined by ", "."""
    headers: dict[str, str] = {}
    for name, value in items:
        name = name.lower()
        if name in PAGE_HEADERS:
            joined = f"{headers[name]}, {value}" if name in headers else value
            headers[name] = joined[:MAX_HEADER_VALUE]
    return headers
