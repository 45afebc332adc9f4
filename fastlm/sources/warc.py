"""Read WARC archives: pages as documents, and policy files (robots.txt and its like) apart.

fastwarc parses the records. It stops at the first one that is broken, so this module finds the next
record and starts it again there: at the next line ``WARC/1.x``, or at the next gzip member if the
compressed data itself is broken. A record counts as whole once the header of the next one was
parsed, or the file ends after it.

GNU wget 1.25 writes addresses in angle brackets, and its arguments and log as records of their own.

Rejected: fastwarc on the compressed file (it takes a member that is cut short for the end of the
file, without an error); its ``verify_digests``, which drops every record that has no digest.
"""

import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
from fastlm.sources.remote import StoreError, open_file
from fastlm.sources.streams import GZIP_MAGIC, ZSTD_MAGIC, GzipMembers, decompressed

PAGE_FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}
NO_PAGE, POLICY_RECORD = "record that is no page", "policy record"
LONG_POLICY = "policy over the size limit"
MAX_POLICY_BYTES = 512 << 10  # RFC 9309 asks for at least 500 KiB
MAX_POLICIES_BYTES = 256 << 20  # of one file; more is an attack
# HTTP headers and the frames of a chunked body around the largest page
MAX_BLOCK_BYTES = MAX_DOCUMENT_BYTES + (1 << 20)
MAX_HEADER_BYTES = 64 << 10  # fastwarc's own limit for a record header
MAX_ENCODINGS = 2  # of a body, one inside the other
MAX_BROKEN = 10_000  # of one file; each costs a search for the next record
# What is read again because records are broken, of which each may reach to the end of the file: in
# lengths of the file, decompressed, and at least in bytes
MAX_REREADS, MIN_REREAD_BYTES = 4, 64 << 20
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
# "googlebot: noindex" and "noai" would be a "noai" for googlebot alone if a comma joined them
LINE_HEADERS = {"x-robots-tag"}
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
    faults: Counter[str] = Counter()
    messages: list[str] = []
    reason: str | None = None  # why the last record is left out; "": not a page's record

    def select(index: int, record: Any) -> bool:
        nonlocal reason
        reason = _rejection(record)
        return range.start <= index < stop and reason is None

    def parse(index: int, record: Any, block: bytes) -> Document | str | None:
        return _page(file, record, block) if range.start <= index < stop else None

    def count_fault(before: int, reason: str, message: str) -> None:
        if range.start <= max(before, 0) < stop:
            faults[reason] += 1
            if len(messages) < MAX_REPORTED_ROWS:
                messages.append(message)

    records = 0
    try:
        with open_file(file.path) as raw:
            # the record after the range is read too: whether the last one is whole depends on it
            for item in walk_records(file, raw, range, select, parse, count_fault):
                if item.index >= stop:
                    break
                if item.index < range.start:
                    continue
                records += 1
                if isinstance(item.value, Document):
                    yield item.value
                elif left_out := item.value or reason:
                    skipped[left_out] += 1
        if faults and not records and range == WHOLE_FILE:
            message = messages[0]
            faults.clear()
            messages.clear()
            raise InputError(message)
    finally:
        skipped.update(faults)
        for message in messages:
            on_skip(message)
        if faults.total() > len(messages):
            on_skip(f"{file.path}: {faults.total() - len(messages):,} more broken records")


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

    def parse(index: int, record: Any, block: bytes) -> PolicyFile | None:
        return _policy(record, block, skipped)

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
    parse: Callable[[int, Any, bytes], Any],
    fault: Fault,
) -> Iterator[RecordItem]:
    """Yield the whole records of an archive, from ``range.offset``; ``range.stop`` is not obeyed.

    ``raw``: the file, with peek and seek. ``parse`` receives the records that ``select`` selects,
    and their blocks; the value of the others is None. ``fault`` receives each fault.
    """
    from fastwarc.warc import ArchiveIterator

    index = range.start if range.offset else 0
    position: Position | None = (range.offset, 0)
    broken = reread = longest = 0
    while position is not None:
        candidate, error, begin = None, None, 0
        stream = _open(raw, position)
        try:
            for record in ArchiveIterator(
                cast(BinaryIO, stream), parse_http=False, fsspec_args=False, stream_detect=False
            ):
                if candidate is not None:
                    yield RecordItem(index, candidate.position, candidate.value)
                    candidate, index = None, index + 1
                begin = record.stream_pos
                origin = stream.locate(begin)
                value = None
                candidate = _Record(origin, False, None)  # if its block cannot be read
                if record.reader is None:
                    size = 0
                elif select(index, record):
                    block = record.reader.read()
                    size = len(block)
                    value = parse(index, record, block)
                else:
                    size = record.reader.consume()
                # fastwarc takes 0 for the length of a header that another one was cut into
                is_complete = str(size) == (record.headers.get("Content-Length") or "").strip()
                candidate = _Record(origin, is_complete, value)
        except PARSE_ERRORS as e:
            if isinstance(e, StoreError) or (isinstance(e, OSError) and e.errno):
                raise
            error = e
        if error is None:
            if candidate is not None and candidate.is_complete and stream.tail == RECORD_END:
                yield RecordItem(index, candidate.position, candidate.value)
                return
            if candidate is None and index:  # nothing follows the last record that was found
                return
        # one record is broken: the last one that was read, or, if that is whole, the one after it
        start = position if candidate is None else candidate.position
        length = None
        if candidate is not None and candidate.is_complete and error is not None:
            length = _record_length(raw, start)
        is_eof = isinstance(error, EOFError)
        is_last = is_eof and length is not None
        position = None if is_last else _next_record(raw, start, (length or 0) + 1)
        broken += 1
        reread += stream.tell() - begin
        longest = max(longest, stream.tell())
        limit = MAX_REWINDS if position is not None and position[1] else MAX_BROKEN
        reason, what = BROKEN_RECORD, error or "a record does not have the length that it declares"
        if broken > limit:
            reason, what, position = CUT_SHORT, f"more than {limit:,} records are broken", None
        elif position is not None and reread > max(MAX_REREADS * longest, MIN_REREAD_BYTES):
            what = f"{broken:,} records are broken, and {reread:,} bytes were read again"
            reason, position = CUT_SHORT, None
        elif position is None and (error is None or is_eof):
            reason, what = CUT_SHORT, "its last record is cut short"
        if candidate is None and start == (0, 0) and stream.first != b"WARC/" and not is_eof:
            what = "it does not start with WARC/"
        message = f"{file.path}, byte {start[0]:,}: expected a WARC archive: {what}"
        fault(index if length is not None else index - 1, reason, message)
        if candidate is not None and length is not None:
            yield RecordItem(index, candidate.position, candidate.value)
            index += 1


class _Stream:
    """The decompressed bytes of an archive from a position. ``tail``: the last four that were read;
    ``first``: the first five.
    """

    def __init__(self, inner: Any, locate: Callable[[int], Position]):
        self._inner, self.locate = inner, locate
        self.tail = self.first = b""
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        data = self._inner.read(size)
        if len(self.first) < 5:
            self.first = (self.first + data[:5])[:5]
        self.tail = (self.tail + data[-4:])[-4:]
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position


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
        raw.seek(offset)
        stream = _Stream(raw, lambda p: (offset + p, 0))
    _skip(stream, skip)
    stream.first = b""
    return stream


def _skip(stream: _Stream, size: int) -> None:
    while size > 0 and (data := stream.read(min(size, SEARCH_BYTES))):
        size -= len(data)


def _record_length(raw: Any, position: Position) -> int | None:
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


class _Answer(NamedTuple):
    """What a server sent: the status, the media type, the HTTP headers and the decoded body."""

    status: int
    kind: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


def _answer(record: Any, block: bytes, max_bytes: int) -> _Answer:
    """Return the answer in a block, with at most ``max_bytes`` of its body. Raises PARSE_ERRORS."""
    from fastwarc.warc import WarcRecord

    kind = record.headers.get("Content-Type") or ""
    if not record.is_http:
        return _Answer(200, _media_type(kind), (), block[:max_bytes])
    # a record of its own: fastwarc's iterator stops at a body that it cannot decode
    head = f"WARC/1.0\r\nContent-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
    copy = WarcRecord.from_bytes(head.encode() + block + RECORD_END)
    copy.parse_http(auto_decode="transfer")  # "all" would decode a bomb before the first read
    headers = tuple(copy.http_headers.items())
    encodings = ",".join(v for k, v in headers if k.lower() == "content-encoding")
    body = _decoded(copy.reader, encodings.lower().replace(" ", "").split(","), max_bytes)
    return _Answer(
        copy.http_headers.status_code or 0, _media_type(copy.http_content_type or ""), headers, body
    )


def _decoded(reader: Any, encodings: list[str], max_bytes: int) -> bytes:
    """Return at most ``max_bytes`` of a body, decoded in bounded memory. Raises PARSE_ERRORS."""
    from fastwarc.stream_io import BrotliReader, GzipReader, ZstdReader

    encodings = [encoding for encoding in encodings if encoding not in ("", "identity")]
    if len(encodings) > MAX_ENCODINGS:
        raise ValueError("too many encodings")
    stream = reader
    for encoding in reversed(encodings):
        body = stream.read(MAX_BLOCK_BYTES)
        if encoding in ("gzip", "x-gzip"):
            # some crawlers keep the header of a body that they have decoded
            is_gzip = body.startswith(GZIP_MAGIC)
            stream = GzipReader(io.BytesIO(body)) if is_gzip else io.BytesIO(body)
        elif encoding == "deflate":
            stream = GzipReader(io.BytesIO(body), zlib=True)
        elif encoding == "br":
            stream = BrotliReader(io.BytesIO(body))
        elif encoding == "zstd":
            stream = ZstdReader(io.BytesIO(body))
        else:
            raise ValueError(f"unknown encoding {encoding}")
    blocks = []
    while max_bytes > 0 and (data := stream.read(max_bytes)):
        blocks.append(data)
        max_bytes -= len(data)
    return b"".join(blocks)


def _media_type(value: str) -> str:
    return value.partition(";")[0].strip().lower()


def _rejection(record: Any) -> str | None:
    """Return why a record holds no page, "" if its type never does, None if its block decides."""
    from fastwarc.warc import WarcRecordType

    types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    if not record.record_type & types:
        return ""
    return OVERSIZE if record.content_length > MAX_BLOCK_BYTES else None


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
    return bool(is_candidate) and _rejection(record) is None


def _page(file: SourceFile, record: Any, block: bytes) -> Document | str:
    """Return the page of a record, or the reason why it is none."""
    url = target_uri(record)
    if _is_policy_url(url):
        return POLICY_RECORD
    if url.startswith("metadata:"):  # wget's arguments and log
        return NO_PAGE
    try:
        answer = _answer(record, block, MAX_DOCUMENT_BYTES + 1)
    except PARSE_ERRORS:
        return BROKEN_RECORD
    kind = PAGE_FORMATS.get(answer.kind)
    if kind is None or answer.status != 200:
        return NO_PAGE
    if len(answer.body) > MAX_DOCUMENT_BYTES:
        return OVERSIZE
    meta: dict[str, Any] = {"format": kind, "url": url}
    if date := record.headers.get("WARC-Date"):
        meta["date"] = date
    if headers := page_headers(answer.headers):
        meta["headers"] = headers
    id = f"{file.name}:{record.record_id or url}"
    return Document(decode_web(answer.body, html=kind == "html"), id, file.source, meta)


def _policy(record: Any, block: bytes, skipped: Counter[str]) -> PolicyFile | None:
    """Return the policy file of a record, None if it is none."""
    url = target_uri(record)
    try:
        answer = _answer(record, block, MAX_POLICY_BYTES + 1)
    except PARSE_ERRORS:
        skipped[BROKEN_RECORD] += 1
        return None
    text = decode_web(answer.body[:MAX_POLICY_BYTES], html=False)
    if not _is_policy_url(url):
        is_licence = answer.kind == "application/rsl+xml" or (
            answer.kind.endswith("xml") and RSL_NAMESPACE in text
        )
        if not is_licence:
            return None
    if len(answer.body) > MAX_POLICY_BYTES:
        skipped[LONG_POLICY] += 1
    return PolicyFile(url, record.headers.get("WARC-Date") or "", answer.status, text)


def page_headers(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the headers of PAGE_HEADERS, in lower case; repeated ones are joined by ", ", those of
    LINE_HEADERS by a line break.
    """
    headers: dict[str, str] = {}
    for name, value in items:
        name = name.lower()
        if name in PAGE_HEADERS:
            separator = "\n" if name in LINE_HEADERS else ", "
            joined = f"{headers[name]}{separator}{value}" if name in headers else value
            headers[name] = joined[:MAX_HEADER_VALUE]
    return headers
