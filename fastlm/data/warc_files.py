"""Write web pages to WARC files and find them again.

Each record is one gzip member, so a record is read by its offset and a file of a killed process is
cut after its last complete record. A file has the ending ``.part`` until it is complete. Records
are written by fastwarc. A body is stored decoded: without its content and transfer encoding, whose
headers are renamed to ``X-Crawler-...`` as Common Crawl does. No reader meets a compression bomb.

Rejected: ``revisit`` records for pages that a server reports as unchanged. The reader of one crawl
would need the files of another one, and the owner could never delete the old crawl.
"""

import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from fastlm.errors import InputError
from fastlm.files import reason, sync
from fastlm.sources.document import MAX_DOCUMENT_BYTES
from fastlm.sources.warc import PAGE_FORMATS, POLICY_PATHS, target_uri

MAX_FILE_BYTES = 10**9  # the customary size of a WARC file
MAX_HEADER_BYTES = 16_384  # of one response. fastwarc reads 32 KiB
LEVEL = 6  # 9 takes a quarter more time and saves nothing; 3 makes files 3 % larger
READ_BYTES = 1 << 20
NAME = re.compile(r"crawl-(\d{5,})\.warc\.gz")
PART = ".part"
# Headers that describe the bytes on the wire. A stored body is decoded.
WIRE_HEADERS = {b"content-encoding", b"content-length", b"transfer-encoding"}

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class StoredPage:
    """A page of a WARC file. ``url`` is as stored, ``date`` its WARC-Date."""

    url: str
    date: str
    record_id: str
    headers: Headers
    body: bytes

    def header(self, name: str) -> bytes:
        """Return the value of the first header of this name in lower case, b"" without one."""
        return next((value for key, value in self.headers if key.lower() == name.encode()), b"")


def warc_date(moment: datetime) -> str:
    """Return a moment as WARC-Date: "2026-08-13T10:00:00Z"."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class WarcWriter:
    """Write response records to ``crawl-00000.warc.gz`` and so on in a folder.

    A new writer begins a new file and first completes the files of a killed one. A write reaches
    the system before `write` returns; a complete file is synced to the disk.

    Args:
        info: fields of the ``warcinfo`` record at the start of each file.
        max_file_bytes: begin a new file after this size.
    """

    def __init__(self, folder: Path, info: Mapping[str, str], max_file_bytes: int = MAX_FILE_BYTES):
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self._info = "".join(f"{key}: {value}\r\n" for key, value in info.items()).encode()
        complete_files(folder)
        numbers = [int(match[1]) for path in warc_paths(folder) if (match := _match(path))]
        self._number = max(numbers, default=-1)
        self._file: io.FileIO | None = None
        self.path = folder

    def write(
        self,
        url: str,
        moment: datetime,
        status_line: str,
        headers: Headers,
        body: bytes,
        fields: Mapping[str, str],
    ) -> tuple[Path, int]:
        """Append a ``response`` record and return its file and offset.

        ``headers`` are those of the response as received and ``body`` is decoded. ``fields`` are
        further headers of the record. InputError: more than 16 KiB of headers. OSError: no space.
        """
        lines = [(_wire_name(key), value) for key, value in headers]
        lines.append((b"Content-Length", b"%d" % len(body)))
        block = [status_line.encode("latin-1", "replace")]
        block += [key + b": " + b" ".join(value.splitlines()) for key, value in lines]
        head = b"\r\n".join(block) + b"\r\n\r\n"
        if len(head) > MAX_HEADER_BYTES:
            raise InputError(f"{url}: expected {MAX_HEADER_BYTES:,} bytes of headers, got more")
        file = self._open()
        fields = {"WARC-Target-URI": url, "WARC-Date": warc_date(moment), **fields}
        data = _record("response", "application/http; msgtype=response", fields, head + body)
        offset = file.tell()
        _append(file, data)
        path = self.path
        if file.tell() >= self.max_file_bytes:
            self.close()
        return path, offset

    def close(self) -> None:
        """Complete the current file. OSError: it cannot be synced or renamed."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            _rename(self.path)

    def _open(self) -> io.FileIO:
        if self._file is None:
            self._number += 1
            name = f"crawl-{self._number:05}.warc.gz"
            self.path = self.folder / (name + PART)
            self._file = io.FileIO(self.path, "xb")
            fields = {"WARC-Date": warc_date(datetime.now(UTC)), "WARC-Filename": name}
            _append(self._file, _record("warcinfo", "application/warc-fields", fields, self._info))
        return self._file


def warc_paths(folder: Path) -> list[Path]:
    """Return the WARC files of a crawl's folder in order, the unfinished ones last."""
    paths = (path for path in folder.iterdir() if _match(path))
    return sorted(paths, key=lambda path: (path.name.endswith(PART), path.name))


def complete_files(folder: Path) -> None:
    """Cut the unfinished WARC files of ``folder`` after their last complete record and rename them
    to their final names. A file without one is deleted.
    """
    for path in warc_paths(folder):
        if path.name.endswith(PART):
            with open(path, "r+b") as file:
                end = last_member_end(file)
                file.truncate(end)
                os.fsync(file.fileno())
            if end:
                _rename(path)
            else:
                path.unlink()


def last_member_end(file: BinaryIO) -> int:
    """Return the offset after the last complete gzip member of ``file``, 0 if there is none."""
    file.seek(0)
    inflate, position, end = zlib.decompressobj(31), 0, 0
    try:
        while data := file.read(READ_BYTES):
            while data:
                inflate.decompress(data, READ_BYTES)
                rest = inflate.unused_data or inflate.unconsumed_tail
                position += len(data) - len(rest)
                data = rest
                if inflate.eof:
                    inflate, end = zlib.decompressobj(31), position
    except zlib.error:  # garbage after a crash of the machine
        pass
    return end


class PageIndex:
    """Where WARC files store the page of a URL. The last record of a URL counts.

    It takes 120 bytes a page. ``key`` maps equal addresses to one text
    (``w3lib.url.canonicalize_url``).
    """

    def __init__(self, key) -> None:
        self._key = key
        self._paths: list[Path] = []
        self._positions: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._positions)

    def read(self, paths: Iterable[Path]) -> Iterator[StoredPage]:
        """Add the pages of WARC files, and yield each. InputError: not a readable WARC file."""
        for path in paths:
            for offset, page in read_pages(path):
                if path not in self._paths[-1:]:
                    self._paths.append(path)
                self._positions[self._digest(page.url)] = len(self._paths) - 1 << 48 | offset
                yield page

    def find(self, url: str) -> StoredPage | None:
        """Return the page of this URL, None if there is none or it is no longer readable."""
        position = self._positions.get(self._digest(url))
        if position is None:
            return None
        path, offset = self._paths[position >> 48], position & (1 << 48) - 1
        try:
            return next((page for _, page in read_pages(path, offset)), None)
        except InputError:
            return None

    def _digest(self, url: str) -> bytes:
        return blake2b(self._key(url).encode(), digest_size=16).digest()


def read_pages(path: Path, offset: int = 0) -> Iterator[tuple[int, StoredPage]]:
    """Yield the pages of a WARC file with their offsets: responses of status 200 with HTML or plain
    text that are no policy files. ``offset`` is that of a record. InputError: unreadable.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    try:
        with open(path, "rb") as file:
            file.seek(offset)
            records = ArchiveIterator(
                file, WarcRecordType.response, fsspec_args=False, auto_decode="all"
            )
            for record in records:
                url = target_uri(record)
                kind = (record.http_content_type or "").partition(";")[0].strip().lower()
                response = record.http_headers
                if not response or response.status_code != 200 or kind not in PAGE_FORMATS:
                    continue
                body = record.reader.read(MAX_DOCUMENT_BYTES + 1)
                if is_policy(url) or len(body) > MAX_DOCUMENT_BYTES:
                    continue
                yield (
                    offset + record.stream_pos,
                    StoredPage(
                        url,
                        record.headers.get("WARC-Date") or "",
                        record.record_id or "",
                        response.items_bytes(),
                        body,
                    ),
                )
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise InputError(f"{path}: expected a WARC file, got: {reason(error)}") from error


def is_policy(url: str) -> bool:
    """Return whether a URL is a fixed address of a policy file. Licence files have any address."""
    try:
        return urlsplit(url).path in POLICY_PATHS
    except ValueError:
        return False


def _match(path: Path) -> re.Match[str] | None:
    return NAME.fullmatch(path.name.removesuffix(PART))


def _wire_name(key: bytes) -> bytes:
    return b"X-Crawler-" + key if key.lower() in WIRE_HEADERS else key


def _record(kind: str, content_type: str, fields: Mapping[str, str], block: bytes) -> bytes:
    """Return a WARC record as a gzip member."""
    from fastwarc.stream_io import GzipWriter
    from fastwarc.warc import WarcRecord, WarcRecordType

    record = WarcRecord()
    record.init_headers(getattr(WarcRecordType, kind))
    for key, value in {**fields, "Content-Type": content_type}.items():
        record.headers[key] = value
    record.set_bytes_content(block)
    buffer = io.BytesIO()
    writer = GzipWriter(buffer, LEVEL)
    record.write(writer, checksum_data=True)
    writer.finish()
    return buffer.getvalue()


def _append(file: io.FileIO, data: bytes) -> None:
    """Write ``data``, or nothing of it. OSError: no space."""
    start, view = file.tell(), memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        file.seek(start)
        file.truncate()
        raise


def _rename(path: Path) -> None:
    os.replace(path, path.with_name(path.name.removesuffix(PART)))
    sync(path.parent)
