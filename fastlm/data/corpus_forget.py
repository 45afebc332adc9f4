"""Find documents in prepared folders and rows in files of JSON lines, and write those again without
them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from fastlm.data.dedup import MIN_PARAGRAPH, PARAGRAPHS, paragraph_key
from fastlm.data.forgotten import document_key, keys_of_row, line_key, names_of, text_key, whole_id
from fastlm.data.prepare import HELDOUT, TRAIN, read_documents
from fastlm.files import replacing, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.sources.rows import Document
from fastlm.sources.streams import compressed, open_stream

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
        line, whole = line_key(source, id), document_key(source, id)
        named = self.names.intersection(names_of(source, id, document.meta))
        found = named | ({line, whole} & self.keys)
        self.matched |= found
        if not self.has_text(document.text) and not found:
            return set()
        of_whole = named - {id, document.meta.get("url")} or (named and id == whole_id(id))
        return {line, text_key(document.text), *([whole] if of_whole else [])}


@dataclass
class FileHits:
    """The lines of a file that are to go: their numbers from 0, keys, texts and documents (source
    and id). ``documents``, ``bytes``: how much text stays.
    """

    path: Path
    numbers: set[int] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    places: list[tuple[str, str]] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0


def search_corpus(folder: Path, wanted: Wanted) -> dict[str, FileHits]:
    """Find the documents of a prepared folder that are asked for, by part. InputError: damaged."""
    paths = {part: folder / name for part, name in PARTS.items() if (folder / name).is_file()}
    return {
        part: _search(path, ((document, set()) for document in read_documents(path)), wanted)
        for part, path in paths.items()
    }


def search_rows(path: Path, wanted: Wanted) -> FileHits:
    """Find the lines of a file of JSON lines that are asked for; those that are no JSON are left as
    they are. InputError: unreadable.
    """
    return _search(path, _read_rows(path), wanted)


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
                given = {"id": "", "source": "", "meta": {"url": row.get("url")}}
                document = Document(text, **(given | names))
            yield document, keys_of_row(row)


def _search(
    path: Path, lines: Iterable[tuple[Document | None, set[str]]], wanted: Wanted
) -> FileHits:
    hits = FileHits(path)
    for number, (document, keys) in enumerate(lines):
        found = keys & wanted.keys
        wanted.matched |= found
        if document is not None:
            found |= wanted.keys_for(document)
        if found:
            hits.numbers.add(number)
            hits.keys |= found
        if document is not None and found:
            hits.texts.append(document.text)
            hits.places.append((document.source, document.id))
        elif document is not None:
            hits.documents += 1
            hits.bytes += len(document.text.encode("utf-8", "replace"))
    return hits


def rewrite(hits: FileHits) -> None:
    """Write a file of JSON lines without these, compressed as it was."""
    with open(hits.path, "rb") as file:
        magic = file.read(4)
    with (
        open_stream(hits.path) as lines,
        replacing(hits.path) as file,
        compressed(file, magic) as out,
    ):
        for number, line in enumerate(lines):
            if number not in hits.numbers:
                out.write(line)


def refresh_funnel(folder: Path, parts: Mapping[str, FileHits]) -> None:
    """Write the funnel of a prepared folder with the documents that stay, unless it has them."""
    funnel = Funnel.load(folder)
    steps = {step["step"]: step for step in funnel.steps}
    gone = sum(steps[part]["documents"] - hits.documents for part, hits in parts.items())
    if not gone:
        return
    for part, hits in parts.items():
        steps[part].update({"documents": hits.documents, "bytes": hits.bytes})
    if STEP not in steps:
        at = min(funnel.steps.index(steps[part]) for part in parts)
        steps[STEP] = {"step": STEP, "documents": 0, "bytes": 0, "removed": {}}
        funnel.steps.insert(at, steps[STEP])
    steps[STEP]["documents"] = sum(hits.documents for hits in parts.values())
    steps[STEP]["bytes"] = sum(hits.bytes for hits in parts.values())
    steps[STEP]["removed"] = {"document": steps[STEP]["removed"].get("document", 0) + gone}
    write_json(folder / FUNNEL, asdict(funnel))


def paragraphs_of(texts: Iterable[str]) -> set[int]:
    """The keys of the paragraphs that count for repeats (`fastlm.data.dedup`)."""
    return {
        paragraph_key(paragraph)
        for text in texts
        for paragraph in PARAGRAPHS.split(text)
        if len(paragraph) >= MIN_PARAGRAPH
    }


def is_rows(path: Path) -> bool:
    """Whether a file is named as one of JSON lines, perhaps compressed."""
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".ndjson")
