"""Turn sources into clean text: gather, extract, cut long documents, drop duplicates, apply quality
rules, scrub, drop repeated paragraphs, split.

The first pass holds one document in memory at a time. Only one key per document and one per
paragraph accumulate. A second pass over the compressed result splits it into train and held-out by
the hash of the content. The same inputs give the same bytes, whatever the order of the files on
disk. Paragraphs are de-duplicated across the whole corpus, so the held-out part shares no paragraph
of MIN_PARAGRAPH characters or more with the training part.

Every step counts what it removed and why (``Funnel``). The work on one document (extract, cut,
apply rules, scrub) is pure and is shared among ``workers`` processes. Decisions that depend on
other documents are made in order in one process.
"""

import io
import json
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Annotated, cast

import zstandard

from fastlm.data.dedup import MIN_PARAGRAPH, DocumentDedup, ParagraphDedup, content_key
from fastlm.data.extract import extract
from fastlm.data.filter import MAX_WORDS, TECHNICAL, check_rules, first_failed
from fastlm.data.forget_log import document_key, line_key, text_key
from fastlm.data.nesting import costly_markup
from fastlm.data.personal import DEFAULT_KINDS
from fastlm.data.personal import replace as scrub
from fastlm.data.split import batches, split_text
from fastlm.errors import InputError
from fastlm.files import atomic_file, clean_up, write_error, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel, StepCounts
from fastlm.progress import silent
from fastlm.sources.source_files import Document, SourceFile, list_files, printable, read_files
from fastlm.sources.streams import ZSTD_MAGIC, compressed

TRAIN, HELDOUT = "train.jsonl.zst", "heldout.jsonl.zst"
STEPS = (
    "gather", "extract", "exact duplicates", "quality rules", "scrub", "repeated paragraphs",
)  # fmt: skip
# A document that loses more than half of its text to repeats is a copy of another one: only
# headings without text remain.
MIN_REMAINING = 0.5
BATCH_BYTES = 1 << 20  # passed to a worker at a time: about 0.2 s of work per 5 ms of pickling


@dataclass(frozen=True)
class DataOptions:
    """Options of ``prepare``. At most ``heldout_bytes`` of clean text, and at most
    ``heldout_fraction`` of all of it, are held out.

    ``rules`` names quality rules of ``fastlm.data.filter``. ``text_field`` is the field of JSON
    lines that holds the text. Gathering stops at ``max_bytes`` of clean text. A document of more
    than ``max_words`` words, such as a book, is cut into parts of at most ``max_words`` words.
    """

    rules: Annotated[
        tuple[str, ...], "Apply these quality rules: technical, web, none, or names with commas"
    ] = TECHNICAL
    heldout_bytes: Annotated[int, "Hold out at most this many bytes of clean text"] = 1 << 20
    heldout_fraction: Annotated[float, "Hold out at most this share of all text"] = 0.1
    scrub: Annotated[bool, "Replace addresses, telephone, card and account numbers, and keys"] = (
        True
    )
    min_paragraph: Annotated[
        int, "Keep a repeated paragraph of this many characters or more only once"
    ] = MIN_PARAGRAPH
    text_field: Annotated[str, "Read the text from this field of JSON lines"] = "text"
    max_words: Annotated[
        int, "Cut a document of more words into parts, at the ends of paragraphs"
    ] = MAX_WORDS
    max_bytes: Annotated[int | None, "Stop after this many bytes of clean text"] = None
    workers: Annotated[int, "Clean text in this many processes"] = 1

    def check(self) -> None:
        """Check the values. InputError names the option."""
        check_rules(self.rules)
        for name, value, minimum in (
            ("heldout_bytes", self.heldout_bytes, 0), ("min_paragraph", self.min_paragraph, 1),
            ("workers", self.workers, 1), ("max_words", self.max_words, 1),
            ("max_bytes", 1 if self.max_bytes is None else self.max_bytes, 1),
        ):  # fmt: skip
            if value < minimum:
                raise InputError(f"{name}: expected {minimum} or more, got {value}")
        if not 0 <= self.heldout_fraction <= 0.5:
            raise InputError(f"heldout_fraction: expected 0 to 0.5, got {self.heldout_fraction}")
        if self.max_words > MAX_WORDS and "word_count" in self.rules:
            raise InputError(
                f"max_words: expected at most {MAX_WORDS:,}, which the rule word_count lets pass, "
                f"got {self.max_words:,}"
            )


@dataclass(slots=True)
class _StepTally:
    documents: int = 0
    bytes: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    extra: dict[str, Counter[str]] = field(default_factory=dict)  # more counts, by name

    def keep(self, size: int) -> None:
        self.documents += 1
        self.bytes += size

    def to_counts(self, name: str) -> StepCounts:
        extra = {key: dict(count) for key, count in self.extra.items() if count}
        removed = dict(sorted(self.removed.items()))
        documents = {"documents": self.documents, "bytes": self.bytes}
        return cast(StepCounts, {"step": name, **documents, "removed": removed, **extra})


@dataclass(slots=True)
class _CleanResult:
    """The results that depend on one document alone. ``failed``: the rule that rejected it or,
    without a key, the reason why it was not parsed.
    """

    extracted_bytes: int = 0
    key: bytes = b""
    failed: str | None = None
    text: str = ""
    replacements: dict[str, int] = field(default_factory=dict)


def clean(document: Document, options: DataOptions) -> list[_CleanResult]:
    """Extract, cut, filter and scrub one document. A long document has one result per part."""
    text = extract(document)
    if not text.strip():
        is_html = document.meta.get("format") == "html"
        return [_CleanResult(failed=costly_markup(document.text) if is_html else None)]
    results = []
    for part in split_text(text, options.max_words):
        failed = first_failed(part, options.rules)
        result = _CleanResult(len(part.encode()), content_key(part), failed)
        if failed is None:
            result.text, result.replacements = scrub(part) if options.scrub else (part, {})
        results.append(result)
    return results


def _clean_batch(batch: list[Document], options: DataOptions) -> list[list[_CleanResult]]:
    return [clean(document, options) for document in batch]


def _clean_all(
    documents: Iterable[Document], options: DataOptions
) -> Iterator[tuple[Document, list[_CleanResult]]]:
    """Clean documents in order. At most two batches per worker are in flight."""
    if options.workers == 1:
        for document in documents:
            yield document, clean(document, options)
        return
    # spawn: a fork of a process with OpenMP threads (torch) may hang. SIGINT is ignored because a
    # terminal sends it to all processes, and a worker would print a traceback
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:  # fmt: skip
        pending: deque = deque()

        def take_finished() -> Iterator[tuple[Document, list[_CleanResult]]]:
            batch, future = pending.popleft()
            yield from zip(batch, future.result(), strict=True)

        for batch in batches(documents, lambda d: len(d.text), BATCH_BYTES):
            pending.append((batch, pool.submit(_clean_batch, batch, options)))
            if len(pending) > 2 * options.workers:
                yield from take_finished()
        while pending:
            yield from take_finished()


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    options: DataOptions | None = None,
    cache: Path,
    track=silent,
    forgotten: Collection[str] = (),
) -> Funnel:
    """Write clean text of ``sources`` to ``out``: train.jsonl.zst, heldout.jsonl.zst and, last,
    funnel.json.

    A line is {"text", "id", "source", "meta"}; `fastlm.data.corpus` reads it. A bad line among
    good ones, and a bad file inside a folder or a package, are counted, reported in the funnel and
    skipped. A bad source or file that the user named raises an error. A failure leaves no new
    folder behind. Documents with a key (`fastlm.data.forget_log`) in ``forgotten`` are left out and
    counted.

    InputError: no sources, bad options, nothing left after cleaning, ``out`` not writable, disk
    full.
    """
    options = options or DataOptions()
    options.check()
    if isinstance(sources, str) or not sources:
        raise InputError(f"sources: expected a list of at least one source, got {sources!r}")
    out = Path(out)
    funnel = Funnel()
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Opened before the downloads, so that a read-only folder is reported at once. It has no
        # name, so it leaves nothing behind.
        with tempfile.TemporaryFile(dir=out) as work:
            keys = frozenset(forgotten)
            index = _write_clean(sources, work, funnel, options, cache, track, keys)
            work.seek(0)
            _write_split(work, out, index, _choose_heldout(index, options), funnel)
    except BaseException as e:
        with suppress(OSError):  # ignore folders that are not empty
            for folder in new_folders:
                folder.rmdir()
        if isinstance(e, OSError):  # a write error: read errors are already InputError
            raise write_error(out, e) from None
        raise
    write_json(out / FUNNEL, asdict(funnel))
    return funnel


def _write_clean(
    sources: Sequence[str], work: IO[bytes], funnel: Funnel, options: DataOptions, cache: Path,
    track, forgotten: Collection[str],
) -> list[tuple[bytes, int]]:  # fmt: skip
    """Write one line per kept document to ``work``. Return [(content key, text bytes)] in order."""
    gather, extracted, unique, filtered, scrubbed, paragraphs = steps = [
        _StepTally() for _ in STEPS
    ]
    unsupported: Counter[str] = Counter()
    extracted.extra["cut"] = cut = Counter()
    replacements = Counter(dict.fromkeys(DEFAULT_KINDS, 0) if options.scrub else {})
    files: list[SourceFile] = []
    for source in track(sources, "fetching", unit="sources"):
        source_files, skipped = list_files(source, cache=cache, unsupported=unsupported)
        files += source_files
        gather.removed.update({f"file: {reason}": n for reason, n in skipped.items()})
        funnel.sources[printable(source)] = {"files": len(source_files), "documents": 0, "bytes": 0}

    def gather_documents() -> Iterator[Document]:
        for document in read_files(
            track(files, "cleaning", unit="files"), field=options.text_field,
            skipped=gather.removed, on_skip=funnel.add_skipped,
        ):  # fmt: skip
            gather.keep(len(document.text.encode("utf-8", "replace")))
            yield document

    index: list[tuple[bytes, int]] = []
    documents, repeats = DocumentDedup(), ParagraphDedup(options.min_paragraph)
    total = 0
    with compressed(work, ZSTD_MAGIC) as lines:
        for document, result in _flatten_results(_clean_all(gather_documents(), options), cut):
            if not result.key:
                extracted.removed[result.failed or "no text"] += 1
                continue
            if forgotten and not _forget_keys(document, result).isdisjoint(forgotten):
                extracted.removed["forgotten"] += 1
                continue
            extracted.keep(result.extracted_bytes)
            if not documents.is_new(result.key):
                unique.removed["same text"] += 1
                continue
            unique.keep(result.extracted_bytes)
            if result.failed is not None:
                filtered.removed[result.failed] += 1
                continue
            filtered.keep(result.extracted_bytes)
            replacements.update(result.replacements)
            scrubbed.keep(len(result.text.encode()))
            text, removed = repeats.strip(result.text)
            paragraphs.removed.update({"paragraph": removed} if removed else {})
            if removed and (reason := _rejection(text, result.text, options, forgotten)):
                paragraphs.removed[reason] += 1
                continue
            size = len(text.encode())
            paragraphs.keep(size)
            tally = funnel.sources[document.source]
            tally["documents"] += 1
            tally["bytes"] += size
            meta = {k: v for k, v in document.meta.items() if k != "format"}
            row = {"text": text, "id": document.id, "source": document.source, "meta": meta}
            # "replace": lone surrogates in the metadata are no legal text either
            lines.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            index.append((result.key, size))
            total += size
            if options.max_bytes is not None and total >= options.max_bytes:
                break
    gather.extra["unsupported_types"] = Counter(dict(unsupported.most_common()))
    funnel.steps += [step.to_counts(name) for name, step in zip(STEPS, steps)]
    funnel.steps[STEPS.index("scrub")]["replaced"] = dict(replacements)
    if not index:
        removed_by_step = {s["step"]: s["removed"] for s in funnel.steps if s["removed"]}
        raise InputError(
            f"sources {', '.join(sources)}: expected text, nothing is left after cleaning:"
            f" {removed_by_step}"
        )
    return index


def _rejection(text: str, before: str, options: DataOptions, forgotten: Collection[str]) -> str:
    """Return why a text without its repeated paragraphs is rejected, "" if it is not."""
    if len(text) < MIN_REMAINING * len(before):
        return "document mostly repeated"
    if "word_count" in options.rules and first_failed(text, ["word_count"]):
        return "document left too short"
    return "forgotten" if text_key(text) in forgotten else ""


def _forget_keys(document: Document, result: _CleanResult) -> set[str]:
    """Return the keys by which a document, or a part of it, is forgotten."""
    location = document.source, document.id
    text = f"text:{result.key.hex()}"
    return {document_key(*location), line_key(*location), text, text_key(result.text)}


def _flatten_results(
    cleaned: Iterable[tuple[Document, list[_CleanResult]]], cut: Counter[str]
) -> Iterator[tuple[Document, _CleanResult]]:
    """Yield one result at a time. The id of a part ends with its number."""
    for document, results in cleaned:
        if len(results) == 1:
            yield document, results[0]
            continue
        cut.update({"document cut": 1, "part produced": len(results)})
        for number, result in enumerate(results):
            yield replace(document, text="", id=f"{document.id}:{number}"), result


def _choose_heldout(index: list[tuple[bytes, int]], options: DataOptions) -> set[int]:
    """Choose documents by the hash of their content, as long as they fit. New text changes few
    choices.
    """
    remaining = min(
        options.heldout_bytes, int(options.heldout_fraction * sum(size for _, size in index))
    )
    heldout = set()
    for i in sorted(range(len(index)), key=lambda i: index[i][0]):
        if index[i][1] <= remaining:
            heldout.add(i)
            remaining -= index[i][1]
    return heldout if len(heldout) < len(index) else set()


def _write_split(
    work: IO[bytes], out: Path, index: list[tuple[bytes, int]], heldout: set[int], funnel: Funnel
) -> None:
    (out / FUNNEL).unlink(
        missing_ok=True
    )  # without it, a mix of old and new files does not look finished
    clean_up(out / HELDOUT)  # it is not alone in the folder: TRAIN is there, too
    lines = io.BufferedReader(cast(io.RawIOBase, zstandard.ZstdDecompressor().stream_reader(work)))
    with (
        atomic_file(out / TRAIN) as train_file,
        atomic_file(out / HELDOUT) as heldout_file,
        compressed(train_file, ZSTD_MAGIC) as train_lines,
        compressed(heldout_file, ZSTD_MAGIC) as heldout_lines,
    ):
        for i, line in enumerate(lines):
            (heldout_lines if i in heldout else train_lines).write(line)
    for name, part in (("train", set(range(len(index))) - heldout), ("heldout", heldout)):
        step = _StepTally(len(part), sum(index[i][1] for i in part))
        funnel.steps.append(step.to_counts(name))
