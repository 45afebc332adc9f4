"""Find documents in prepared folders and rows in files of JSON lines, and write those again without
them.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from fastlm.data.dedup import MIN_PARAGRAPH, PARAGRAPHS, paragraph_key
from fastlm.data.forgotten import document_key, keys_of_row, line_key, names_of, text_key, whole_id
from fastlm.data.prepare import HELDOUT, TRAIN, ZSTD_LEVEL, read_documents
from fastlm.files import replacing, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.sources.rows import Document
from fastlm.sources.streams import GZIP_MAGIC, ZSTD_MAGIC, open_stream

STEP = "forgotten"  # of the funnel
PARTS = {"train": TRAIN, "heldout": HELDOUT}


@dataclass
class Wanted:
    """What is to be forgotten. ``names``: ids, URLs, paths, sources as they were given. ``sums``:
    SHA-256 of texts. ``keys``: of `fastlm.data.forgotten`. ``matched`` collects what was found.
    """

    names: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    matched: set[str] = field(default_factory=set)

    def has_text(self, text: str) -> bool:
        """Whether a text is asked for by its hash."""
        found = {text_key(text)} & self.keys
        if self.sums:
            found |= {sha256(text.encode("utf-8", "replace")).hexdigest()} & self.sums
        self.matched |= found
        return bool(found)

    def keys_for(self, document: Document) -> set[str]:
        """The keys under which a document is forgotten, none if it is not asked for."""
        source, id = document.source, document.id
        found = set()
        if named := self.names.intersection(names_of(source, id, document.meta)):
            self.matched |= named
            found = {line_key(source, id), text_key(document.text)}
            if named - {id, document.meta.get("url")} or id == whole_id(id):
                found.add(document_key(source, id))
        by_key = {line_key(source, id), document_key(source, id)} & self.keys
        if by_key or self.has_text(document.text):
            self.matched |= by_key
            found |= {line_key(source, id), text_key(document.text)}
        return found

    def has_row(self, row: Any) -> set[str]:
        """The keys of a row to train on that are asked for."""
        found = keys_of_row(row) & self.keys
        if isinstance(row, Mapping) and isinstance(text := row.get("text"), str):
            id, url = row.get("id"), row.get("url")
            named = self.names & {value for value in (id, url) if isinstance(value, str)}
            self.matched |= named
            if named or self.has_text(text):
                found = found | {text_key(text)}
        self.matched |= found
        return found


@dataclass
class Gone:
    """The documents of a corpus that are to go: their texts, and their number in each part."""

    folder: Path
    numbers: dict[str, set[int]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    places: list[tuple[str, str]] = field(default_factory=list)  # (source, id)


def search_corpus(folder: Path, wanted: Wanted) -> Gone:
    """Find the documents of a prepared folder that are asked for. InputError: damaged."""
    gone = Gone(folder)
    for part, name in PARTS.items():
        if not (folder / name).is_file():
            continue
        for number, document in enumerate(read_documents(folder / name)):
            if keys := wanted.keys_for(document):
                gone.numbers.setdefault(part, set()).add(number)
                gone.texts.append(document.text)
                gone.keys |= keys
                gone.places.append((document.source, document.id))
    return gone


def rewrite_corpus(gone: Gone) -> None:
    """Write a prepared folder without these documents, and its funnel with the new counts. A kill
    leaves old or new files, whole; the next call, with what is then found, ends the work.
    """
    folder = gone.folder
    counts: dict[str, tuple[int, int]] = {}
    for part, name in PARTS.items():
        if (folder / name).is_file():
            counts[part] = _rewrite_part(folder / name, gone.numbers.get(part, set()))
    funnel = Funnel.load(folder)
    steps = {step["step"]: step for step in funnel.steps}
    before = sum(steps[part]["documents"] for part in counts)
    after = sum(count for count, _ in counts.values())
    for part, (documents, size) in counts.items():
        steps[part].update({"documents": documents, "bytes": size})
    if STEP not in steps:
        at = min(funnel.steps.index(steps[part]) for part in counts)
        steps[STEP] = {"step": STEP, "documents": 0, "bytes": 0, "removed": {}}
        funnel.steps.insert(at, steps[STEP])
    removed = steps[STEP]["removed"].get("document", 0) + before - after
    steps[STEP].update({
        "documents": after, "bytes": sum(size for _, size in counts.values()),
        "removed": {"document": removed},
    })  # fmt: skip
    write_json(folder / FUNNEL, asdict(funnel))


def _rewrite_part(path: Path, numbers: Collection[int]) -> tuple[int, int]:
    """Write a part without the documents of these numbers; return how many are left, and the bytes
    of their text.
    """
    documents = size = 0
    with open_stream(path) as lines:
        if not numbers:
            for document in read_documents(path):
                documents, size = documents + 1, size + len(document.text.encode())
            return documents, size
        with replacing(path) as file, _compressed(file, ZSTD_MAGIC) as out:
            for number, line in enumerate(lines):
                if number not in numbers:
                    out.write(line)
                    documents, size = documents + 1, size + _text_bytes(line)
    return documents, size


def _text_bytes(line: bytes) -> int:
    return len(json.loads(line)["text"].encode())


def unfinished(folder: Path) -> bool:
    """Whether the funnel has other counts than the files: a rewrite was cut off."""
    steps = {step["step"]: step for step in Funnel.load(folder).steps}
    for part, name in PARTS.items():
        if (folder / name).is_file() and part in steps:
            found = sum(1 for _ in read_documents(folder / name))
            if found != steps[part]["documents"]:
                return True
    return False


def search_rows(path: Path, wanted: Wanted) -> tuple[set[int], set[str]]:
    """(numbers of the lines from 0, their keys) of a file of JSON lines. Lines that are no JSON are
    left as they are. InputError: unreadable.
    """
    numbers, keys = set(), set()
    with open_stream(path) as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if found := wanted.has_row(row):
                numbers.add(number)
                keys |= found
    return numbers, keys


def rewrite_rows(path: Path, numbers: Collection[int]) -> None:
    """Write a file of JSON lines without the lines of these numbers, compressed as it was."""
    with open(path, "rb") as file:
        magic = file.read(4)
    with (
        open_stream(path) as lines,
        replacing(path) as file,
        _compressed(file, magic) as out,
    ):
        for number, line in enumerate(lines):
            if number not in numbers:
                out.write(line)


@contextmanager
def _compressed(file: IO[bytes], magic: bytes) -> Iterator[IO[bytes]]:
    if magic.startswith(GZIP_MAGIC):
        import gzip

        with gzip.GzipFile(fileobj=file, mode="wb") as out:
            yield cast(IO[bytes], out)
    elif magic == ZSTD_MAGIC:
        compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, write_checksum=True)
        with compressor.stream_writer(file, closefd=False) as out:
            yield cast(IO[bytes], out)
    else:
        yield file


def paragraphs_of(texts: Collection[str]) -> set[int]:
    """The keys of the paragraphs that count for repeats (`fastlm.data.dedup`)."""
    return {
        paragraph_key(paragraph)
        for text in texts
        for paragraph in PARAGRAPHS.split(text)
        if len(paragraph) >= MIN_PARAGRAPH
    }


def repeats(
    folder: Path, paragraphs: Collection[int], gone: Callable[[str, int], bool]
) -> Iterator[tuple[Document, int]]:
    """Yield (document, number of paragraphs) of the documents that stay and share paragraphs.
    ``gone``: whether a document of a part goes.
    """
    for part, name in PARTS.items():
        if not paragraphs or not (folder / name).is_file():
            continue
        for number, document in enumerate(read_documents(folder / name)):
            if gone(part, number):
                continue
            if shared := len(paragraphs_of([document.text]) & set(paragraphs)):
                yield document, shared


def is_rows(path: Path) -> bool:
    """Whether a file is named as one of JSON lines, perhaps compressed."""
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".ndjson")
