"""Find documents in prepared folders and rows in files of JSON lines, and remove them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from fastlm.data.corpus import read_documents
from fastlm.data.dedup import MIN_PARAGRAPH, PARAGRAPHS, paragraph_key
from fastlm.data.forget_log import (
    document_id,
    document_key,
    document_names,
    line_key,
    row_keys,
    text_key,
)
from fastlm.data.prepare import HELDOUT, TRAIN
from fastlm.files import atomic_file, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.sources.source_files import Document
from fastlm.sources.streams import compressed, open_stream

STEP = "forgotten"  # of the funnel
PARTS = {"train": TRAIN, "heldout": HELDOUT}


@dataclass
class ForgetQuery:
    """What to forget. ``names``: ids, URLs, paths, sources as they were given. ``sums``: SHA-256 of
    texts. ``keys``: keys of `fastlm.data.forget_log`. ``matches`` collects what was found of these.
    """

    names: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    matches: set[str] = field(default_factory=set)

    def match_text(self, text: str) -> bool:
        """Return whether a text is to be forgotten by its hash."""
        matches = {text_key(text)} & self.keys
        if self.sums:
            matches |= {sha256(text.encode("utf-8", "replace")).hexdigest()} & self.sums
        self.matches |= matches
        return bool(matches)

    def match_document(self, document: Document) -> set[str]:
        """Return the keys under which to forget a document, none if it stays."""
        source, id = document.source, document.id
        line, whole_document = line_key(source, id), document_key(source, id)
        names = self.names.intersection(document_names(source, id, document.meta))
        matches = names | ({line, whole_document} & self.keys)
        self.matches |= matches
        if not self.match_text(document.text) and not matches:
            return set()
        other_names = names - {id, document.meta.get("url")}
        has_whole_document = other_names or (names and id == document_id(id))
        parts = [whole_document] if has_whole_document else []
        return {line, text_key(document.text), *parts}


@dataclass
class FileHits:
    """The lines to remove from a file: their numbers from 0, keys, texts and documents (source and
    id). ``remaining_documents``, ``remaining_bytes``: how much text remains.
    """

    path: Path
    line_numbers: set[int] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    documents: list[tuple[str, str]] = field(default_factory=list)
    remaining_documents: int = 0
    remaining_bytes: int = 0


def search_corpus(folder: Path, query: ForgetQuery) -> dict[str, FileHits]:
    """Find the documents of a prepared folder that match, by part. InputError: damaged."""
    paths = {part: folder / name for part, name in PARTS.items() if (folder / name).is_file()}
    return {
        part: _search(path, ((document, set()) for document in read_documents(path)), query)
        for part, path in paths.items()
    }


def search_rows(path: Path, query: ForgetQuery) -> FileHits:
    """Find the lines of a file of JSON lines that match. Lines that are not JSON stay as they are.
    InputError: unreadable.
    """
    return _search(path, _read_rows(path), query)


def _read_rows(path: Path) -> Iterator[tuple[Document | None, set[str]]]:
    with open_stream(path) as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            document = None
            if isinstance(row, Mapping) and isinstance(text := row.get("text"), str):
                names = {key: row[key] for key in ("id", "source") if isinstance(row.get(key), str)}
                defaults = {"id": "", "source": "", "meta": {"url": row.get("url")}}
                document = Document(text, **(defaults | names))
            yield document, row_keys(row)


def _search(
    path: Path, lines: Iterable[tuple[Document | None, set[str]]], query: ForgetQuery
) -> FileHits:
    hits = FileHits(path)
    for number, (document, keys) in enumerate(lines):
        matches = keys & query.keys
        query.matches |= matches
        if document is not None:
            matches |= query.match_document(document)
        if matches:
            hits.line_numbers.add(number)
            hits.keys |= matches
        if document is not None and matches:
            hits.texts.append(document.text)
            hits.documents.append((document.source, document.id))
        elif document is not None:
            hits.remaining_documents += 1
            hits.remaining_bytes += len(document.text.encode("utf-8", "replace"))
    return hits


def remove_lines(hits: FileHits) -> None:
    """Write a file of JSON lines without the lines of ``hits``, in the same compression."""
    with open(hits.path, "rb") as file:
        magic = file.read(4)
    with (
        open_stream(hits.path) as lines,
        atomic_file(hits.path) as file,
        compressed(file, magic) as out,
    ):
        for number, line in enumerate(lines):
            if number not in hits.line_numbers:
                out.write(line)


def refresh_funnel(folder: Path, parts: Mapping[str, FileHits]) -> None:
    """Update the funnel of a prepared folder to the documents that remain, if it has others."""
    funnel = Funnel.load(folder)
    steps = {step["step"]: step for step in funnel.steps}
    removed = sum(
        steps[part]["documents"] - hits.remaining_documents for part, hits in parts.items()
    )
    if not removed:
        return
    for part, hits in parts.items():
        steps[part].update({"documents": hits.remaining_documents, "bytes": hits.remaining_bytes})
    if STEP not in steps:
        index = min(funnel.steps.index(steps[part]) for part in parts)
        steps[STEP] = {"step": STEP, "documents": 0, "bytes": 0, "removed": {}}
        funnel.steps.insert(index, steps[STEP])
    steps[STEP]["documents"] = sum(hits.remaining_documents for hits in parts.values())
    steps[STEP]["bytes"] = sum(hits.remaining_bytes for hits in parts.values())
    steps[STEP]["removed"] = {"document": steps[STEP]["removed"].get("document", 0) + removed}
    write_json(folder / FUNNEL, asdict(funnel))


def paragraph_keys(texts: Iterable[str]) -> set[int]:
    """Return the keys of the paragraphs that count for repeats (`fastlm.data.dedup`)."""
    return {
        paragraph_key(paragraph)
        for text in texts
        for paragraph in PARAGRAPHS.split(text)
        if len(paragraph) >= MIN_PARAGRAPH
    }


def is_json_lines(path: Path) -> bool:
    """Return whether the name of a file is one of JSON lines, compressed or not."""
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".ndjson")
