"""Find documents in prepared folders and rows in files of JSON lines, and remove them."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import tee
from pathlib import Path
from typing import NamedTuple

from fastlm.data.corpus import (
    CARD_FILES,
    REMOVED,
    SPLITS,
    RemovedRecord,
    corpus_parts,
    is_part_name,
    list_parts,
    read_documents,
    read_units,
    split_files,
    update_units,
)
from fastlm.data.dedup import MIN_PARAGRAPH, PARAGRAPHS, THRESHOLD, paragraph_key
from fastlm.data.forget_log import (
    document_id,
    document_key,
    document_names,
    line_key,
    row_keys,
    text_key,
)
from fastlm.data.near_copies import NearCopies
from fastlm.data.removals import read_removed
from fastlm.files import atomic_file, sync, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.schema import parse
from fastlm.sources.source_files import Document
from fastlm.sources.streams import compressed, open_stream

STEP = "forgotten"  # of the funnel
# what fastlm.data.steps writes in the records of copies
COPY_DETAIL = re.compile(r"(?:(\d\.\d+) like|same text as) (.+)", re.DOTALL)


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
    id). ``remaining_lines``, ``remaining_documents``, ``remaining_bytes``: what remains.
    """

    path: Path
    line_numbers: set[int] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    documents: list[tuple[str, str]] = field(default_factory=list)
    remaining_lines: int = 0
    remaining_documents: int = 0
    remaining_bytes: int = 0


class NearCopy(NamedTuple):
    """A document that is a near copy of a forgotten text."""

    path: str
    source: str
    id: str
    similarity: float


def search_corpus(
    folder: Path, query: ForgetQuery, *, after_kill: bool = False
) -> dict[str, list[FileHits]]:
    """Find the documents of a prepared folder that match, by split and file.

    Args:
        after_kill: a killed call for the same query may have left parts and units.json that differ.

    InputError: damaged; parts and units.json differ.
    """
    files = split_files(folder)
    if not after_kill:
        files = {split: corpus_parts(folder, split) for split in files}
    return {
        split: [
            _search(path, ((document, set()) for document in read_documents(path)), query)
            for path in paths
        ]
        for split, paths in files.items()
    }


def remaining_copies(folder: Path, query: ForgetQuery) -> dict[str, float]:
    """Return {"SOURCE ID": similarity} of the documents that remain in place of documents that
    match. A build removed these as copies, so that only the records in OUT/removed have them.
    """
    copies = {}
    for path in list_parts(folder / REMOVED):
        with open_stream(path) as lines:
            for number, line in enumerate(lines, 1):
                record = parse(line, RemovedRecord, f"{path}, line {number}")
                detail = COPY_DETAIL.fullmatch(record["detail"] or "")
                document = Document("", record["id"], record["source"], {"url": record["url"]})
                if detail and query.match_document(document) - {text_key("")}:
                    similarity, name = detail.groups()
                    copies[name] = max(copies.get(name, 0.0), float(similarity or 1))
    return copies


def add_near_copies(
    hits: FileHits, copies: NearCopies, others: Mapping[str, float]
) -> list[NearCopy]:
    """Add the near copies among the documents of a file to its hits, and ``others``, those of
    `remaining_copies`. Return them.
    """
    added = []
    first, second = tee(read_documents(hits.path))
    similarities = copies.similarities(document.text for document in first)
    for number, (document, similarity) in enumerate(zip(second, similarities)):
        similarity = max(similarity, others.get(f"{document.source} {document.id}", 0.0))
        if not similarity or number in hits.line_numbers:
            continue
        hits.line_numbers.add(number)
        hits.keys |= {line_key(document.source, document.id), text_key(document.text)}
        hits.texts.append(document.text)
        hits.documents.append((document.source, document.id))
        hits.remaining_lines -= 1
        hits.remaining_documents -= 1
        hits.remaining_bytes -= len(document.text.encode("utf-8", "replace"))
        path = str(hits.path)
        added.append(NearCopy(path, document.source, document.id, round(similarity, 3)))
    return added


def removed_copies(folder: Path, names: Iterable[str], *, near: bool) -> set[str]:
    """Return the "SOURCE ID" of the documents that a build removed as copies of the documents with
    ``names``, and of copies with the same text as these. near: also near copies, from 0.8.
    """
    recent = {*names}
    copies: set[str] = set()
    while recent:
        records = read_removed(folder)
        details = ((r, COPY_DETAIL.fullmatch(r["detail"] or "")) for r in records)
        recent = {
            f"{record['source']} {record['id']}"
            for record, detail in details
            if detail and detail[2] in recent
            and (detail[1] is None or (near and float(detail[1]) >= THRESHOLD))
        } - copies  # fmt: skip
        copies |= recent
    return copies


def search_removed(
    folder: Path,
    query: ForgetQuery,
    keys: Iterable[str],
    texts: Iterable[str],
    copies: Collection[str] = (),
) -> list[FileHits]:
    """Find the records in OUT/removed that match: those of documents that match ``query`` or have
    one of ``keys``, those whose text is the beginning of one of ``texts``, and those of ``copies``,
    with names "SOURCE ID". InputError: damaged.
    """
    query = replace(query, keys=query.keys.union(keys))
    beginnings = _Beginnings(texts)
    files = []
    for path in list_parts(folder / REMOVED):
        hits = FileHits(path)
        with open_stream(path) as lines:
            for number, line in enumerate(lines):
                record = parse(line, RemovedRecord, f"{path}, line {number + 1}")
                id, source, meta = record["id"], record["source"], {"url": record["url"]}
                # the excerpt is no complete text, so it has no key
                matches = query.match_document(Document("", id, source, meta)) - {text_key("")}
                is_copy = f"{source} {id}" in copies
                if matches or is_copy or record["text"] in beginnings:
                    hits.line_numbers.add(number)
                    hits.keys |= matches | ({line_key(source, id)} if is_copy else set())
                    hits.documents.append((source, id))
                else:
                    hits.remaining_lines += 1
        files.append(hits)
    return files


class _Beginnings:
    """The beginnings of texts: ``excerpt in beginnings``, each in the time of one look-up."""

    def __init__(self, texts: Iterable[str]):
        self.texts = list(texts)
        self.by_length: dict[int, set[str]] = {}

    def __contains__(self, excerpt: str) -> bool:
        length = len(excerpt)
        if length not in self.by_length:
            self.by_length[length] = {text[:length] for text in self.texts}
        return length > 0 and excerpt in self.by_length[length]


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
        else:
            hits.remaining_lines += 1
        if document is not None and matches:
            hits.texts.append(document.text)
            hits.documents.append((document.source, document.id))
        elif document is not None:
            hits.remaining_documents += 1
            hits.remaining_bytes += len(document.text.encode("utf-8", "replace"))
    return hits


def remove_lines(hits: FileHits) -> None:
    """Write a file of JSON lines without the lines of ``hits``, in the same compression. A part of
    a corpus that has no other lines is deleted.
    """
    is_part = is_part_name(hits.path.name) and hits.path.parent.name in (*SPLITS, REMOVED)
    if is_part and not hits.remaining_lines:
        hits.path.unlink(missing_ok=True)
        sync(hits.path.parent)
        return
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


def refresh_units(folder: Path, files: Mapping[str, list[FileHits]]) -> None:
    """Update units.json of a prepared folder to the parts that remain, if it has others."""
    counts = {
        f"{split}/{hits.path.name}": (hits.remaining_documents, hits.remaining_bytes)
        for split, split_hits in files.items()
        for hits in split_hits
    }
    for record in read_units(folder):
        if not (folder / record["part"]).is_file():  # deleted by a killed call
            counts.setdefault(record["part"], (0, 0))
    update_units(folder, counts)


def remove_card(folder: Path) -> None:
    """Delete the card of a corpus, which quotes documents and counts those that were there."""
    for name in CARD_FILES:
        (folder / name).unlink(missing_ok=True)


def refresh_funnel(folder: Path, files: Mapping[str, list[FileHits]]) -> None:
    """Update the funnel of a prepared folder to the documents that remain, if it has others."""
    funnel = Funnel.load(folder)
    steps = {step["step"]: step for step in funnel.steps}
    remaining = {
        split: (sum(h.remaining_documents for h in hits), sum(h.remaining_bytes for h in hits))
        for split, hits in files.items()
    }
    removed = sum(steps[split]["documents"] - count for split, (count, _) in remaining.items())
    if not removed:
        return
    for split, (documents, size) in remaining.items():
        steps[split].update({"documents": documents, "bytes": size})
    if STEP not in steps:
        index = min(funnel.steps.index(steps[split]) for split in remaining)
        steps[STEP] = {"step": STEP, "documents": 0, "bytes": 0, "removed": {}}
        funnel.steps.insert(index, steps[STEP])
    steps[STEP]["documents"] = sum(documents for documents, _ in remaining.values())
    steps[STEP]["bytes"] = sum(size for _, size in remaining.values())
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
