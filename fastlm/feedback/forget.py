"""Forget documents and conversations: in prepared folders, token shards, rows to train on and the
feedback database; and name the models that saw them.

What is found is noted first (`fastlm.data.forget_log`), then removed: from the database, then the
token shards that were made of it, rows, and last from the prepared folders, by which the shards are
found. So the same command ends the work of one that was killed, and names the same models when all
is gone.

Rejected: to search and remove_lines shards. That needs their tokenizer, and a training has to start
again in any case; `fastlm data shards` makes them from what stays.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.corpus_forget import (
    FileHits,
    ForgetQuery,
    is_json_lines,
    paragraph_keys,
    refresh_funnel,
    remove_lines,
    search_corpus,
    search_rows,
)
from fastlm.data.forget_log import (
    FORGET_LOG,
    ForgetRecord,
    conversation_key,
    read_forget_log,
    request_key,
    response_key,
)
from fastlm.data.prepare import HELDOUT, TRAIN, read_documents
from fastlm.errors import InputError
from fastlm.files import append_lines, read_json, write_json
from fastlm.pipeline.archive import PREVIOUS
from fastlm.pipeline.funnel import FUNNEL
from fastlm.pipeline.provenance import artifact_id, digest, ids_of, own_files
from fastlm.pipeline.record import ALONE, save_alone, table_of
from fastlm.pipeline.registry import CHANGED, GONE, INDEX, INNER, Known, Registry, open_registry
from fastlm.pipeline.report import REPORT, SUMMARY
from fastlm.pipeline.run import locked
from fastlm.pipeline.run_folder import STAGES
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

DATA = {"corpus", "shards"}  # what is searched itself, and so is clean or named
NOT_ROWS = {INDEX, FORGET_LOG, "metrics.jsonl"}
SHARDS = "fastlm-shards-"


@dataclass
class Report:
    """What was removed (or would be): per place its kind and a count; what could not be checked;
    where parts of it stand elsewhere; which sources still have it; what may quote it (samples of
    trainings, items of evaluations, reports); models that saw it.
    """

    removed: list[dict[str, Any]] = field(default_factory=list)
    database: int = 0
    not_found: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    elsewhere: list[dict[str, Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    quotes: list[str] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    @property
    def remains(self) -> bool:
        """Whether a model that saw it is still there, or a place could not be checked."""
        return bool(self.unchecked) or any(m["state"] != GONE for m in self.models)


def forget(
    paths: Sequence[str | Path],
    names: Sequence[str] = (),
    *,
    keys: Iterable[str] = (),
    store: "FeedbackStore | None" = None,
    dry_run: bool = False,
) -> Report:
    """Remove what is asked for from everything below ``paths``.

    Args:
        paths: folders of runs, prepared folders, files of rows.
        names: ids of documents, responses or conversations, URLs, paths, sources, SHA-256 of texts.
        keys: of `fastlm.data.forget_log`, as of consent that was withdrawn.
        store: a feedback database, in which ``names`` are responses and conversations.
        dry_run: change nothing.

    InputError: nothing asked for, a path that is missing, a run that is at work, damaged data.
    """
    if not names and not keys and store is None:
        raise InputError("what: expected something to forget, got nothing")
    roots = [Path(path) for path in paths]
    for root in roots:
        if not (root.is_dir() or (root.is_file() and is_json_lines(root))):
            got = "another file" if root.exists() else "nothing"
            raise InputError(f"{root}: expected a folder or a file of JSON lines, got {got}")
    work = _Work(roots, names, keys, store)
    work.search()
    if not dry_run:
        work.remove()
    work.report.not_found = work.missing()
    work.report.quotes = _quotes(work)
    work.report.models = _models(work)
    return work.report


class _Work:
    def __init__(
        self, roots: list[Path], names: Sequence[str], keys: Iterable[str],
        store: "FeedbackStore | None",
    ):  # fmt: skip
        self.names, self.store = names, store
        self.folders = list(dict.fromkeys(r if r.is_dir() else r.parent for r in roots))
        self.asked = {request_key(name): name for name in names}
        # what earlier calls found under the same names or keys
        self.places = _places(roots)
        logs = dict.fromkeys([*self.folders, *self.places[0]])
        log = [line for folder in logs for line in read_forget_log(folder)]
        asked = [line for line in log if self.asked.keys() & {*line.request_keys}]
        self.before = [line for line in log if line in asked or {*keys} & {*line.keys}]
        wanted = {*keys, *(key for line in asked for key in line.keys)}
        for name in names:
            wanted |= {response_key(name), conversation_key(name)}
            if store is not None:
                wanted |= {*store.withdrawn(name), *store.keys_of(name)}
        sums = frozenset(name.lower() for name in names if re.fullmatch("(?i)[0-9a-f]{64}", name))
        paths = {str(Path(name).absolute()) for name in names if Path(name).exists()}
        self.query = ForgetQuery(frozenset([*names, *paths]), sums, frozenset(wanted))
        self.registry = open_registry(self.folders, note=False)
        self.report = Report()
        self.corpora: dict[Path, dict[str, FileHits]] = {}
        self.shards: list[Path] = []
        self.rows: list[FileHits] = []
        self.keys: set[str] = set()
        self.held: set[str] = {id for line in self.before for id in line.content_ids}

    # ---- search

    def search(self) -> None:
        corpora, shards, rows = self.places
        for folder in corpora:
            self.corpora[folder] = parts = search_corpus(folder, self.query)
            if self._found("document", folder, parts.values()):
                self.held |= self._ids("corpus", folder)
        for path in rows:
            hits = search_rows(path, self.query)
            if self._found("row", path, [hits]):
                self.rows.append(hits)
        for folder in shards:
            corpora, record = self._corpora_of(folder), self._record(folder)
            # made of text of which an earlier call removed something
            stale = record is not None and not self.held.isdisjoint(record.read())
            if stale or corpora & self.gone.keys():
                self.shards.append(folder)
                self.held |= self._ids("shards", folder)
                if folder.name in ("train", "heldout"):
                    self.held |= self._ids("shards", folder.parent)
                self._tell("set of token shards", folder, 1)
            elif not corpora or (record is None and self.before):
                why = "its prepared text is not here to find the documents by"
                if corpora:
                    why = "no record says whether it was made before documents were removed"
                self.report.unchecked.append(f"{folder}: {why}")
        if self.store is not None:
            self.report.database = sum(bool(self.store.keys_of(name)) for name in self.names)
        self._elsewhere()

    def _found(self, what: str, place: Path, files: Iterable[FileHits]) -> bool:
        """Note what is to go of a place. Whether there is any."""
        hit = [hits for hits in files if hits.line_numbers]
        for hits in hit:
            self.keys |= hits.keys
            self.held.add(digest(hits.path))
        if hit:
            self._tell(what, place, sum(len(hits.line_numbers) for hits in hit))
        return bool(hit)

    def _tell(self, what: str, place: Path, count: int) -> None:
        self.report.removed.append({"place": str(place), "what": what, "count": count})

    @property
    def gone(self) -> dict[Path, list[FileHits]]:
        """The prepared folders of which something goes, with their parts."""
        its = {folder: [*parts.values()] for folder, parts in self.corpora.items()}
        return {
            folder: parts for folder, parts in its.items() if any(h.line_numbers for h in parts)
        }

    @property
    def texts(self) -> list[str]:
        return [text for parts in self.gone.values() for hits in parts for text in hits.texts]

    def _ids(self, kind: str, folder: Path) -> set[str]:
        """The content ids of a data folder: now, and by its record."""
        record = self._record(folder)
        known = {record.ids[kind]} if record is not None and kind in record.ids else set()
        input_digest = InputDigest(Path(os.devnull), cache=Path(os.devnull))
        return known | {artifact_id((kind,), folder, input_digest)}

    def _record(self, folder: Path) -> Known | None:
        """The record of the stage in whose folder this is."""
        records = [r for r in self.registry.records if r.state != GONE]
        found = [r for r in records if folder.absolute().is_relative_to(r.place.absolute())]
        return max(found, key=lambda r: len(r.place.parts), default=None)

    def _corpora_of(self, folder: Path) -> set[Path]:
        """The prepared folders that these shards were made of, of those that were searched."""
        searched = {c.absolute(): c for c in self.corpora}
        if (record := self._record(folder)) is None:
            return {c for c in self.corpora if folder.is_relative_to(c.parent)}
        makers = [maker for key, _, maker in self.registry.parents(record) if key == "corpus"]
        places = [maker.place.absolute() for maker in makers if maker is not None]
        return {searched[place] for place in places if place in searched}

    def _elsewhere(self) -> None:
        """Find the paragraphs of what goes in documents that stay, and sources that still have
        it.
        """
        paragraphs = paragraph_keys(self.texts)
        files = [(f, hits) for f, parts in self.corpora.items() for hits in parts.values()]
        for folder, hits in files if paragraphs else ():
            for number, document in enumerate(read_documents(hits.path)):
                shared = paragraphs & paragraph_keys([document.text])
                if shared and number not in hits.line_numbers:
                    self.report.elsewhere.append({
                        "place": str(folder), "source": document.source, "id": document.id,
                        "paragraphs": len(shared),
                    })  # fmt: skip
        places = [
            place for parts in self.gone.values() for hits in parts for place in hits.documents
        ]
        self.report.sources = list(dict.fromkeys(f"{source}: {id}" for source, id in places))

    def missing(self) -> list[str]:
        """The names of which nothing was found, now or earlier."""
        told = {
            name for line in self.before for a in line.request_keys if (name := self.asked.get(a))
        }
        found = {*self.query.matches, *told}
        return [
            name
            for name in self.names
            if found.isdisjoint([
                name, str(Path(name).absolute()), name.lower(), response_key(name),
                conversation_key(name),
            ])
            and not (self.store is not None and self.store.withdrawn(name))
        ]  # fmt: skip

    # ---- removal

    def remove(self) -> None:
        from fastlm.data.shards import remove_shards

        touched = [*self.gone, *self.shards]
        records = {r.id: r for folder in touched if (r := self._record(folder))}
        # whose data an earlier call, which was killed, wrote again
        for record in self.registry.records:
            ours = DATA & record.ids.keys() and self.held & {*record.held()}
            if ours and record.state == CHANGED:
                records[record.id] = record
        runs = {r.place.parent for r in records.values() if (r.place.parent / STAGES).is_file()}
        with ExitStack() as stack:
            for run in sorted(runs):
                stack.enter_context(locked(run))
            self._note(runs)
            if self.store is not None:
                for name in self.names:
                    self.store.forget(name)
            for folder in self.shards:
                remove_shards(folder)
            corpora = [hits for parts in self.corpora.values() for hits in parts.values()]
            for hits in (*self.rows, *(hits for hits in corpora if hits.line_numbers)):
                remove_lines(hits)
            for folder, parts in self.corpora.items():
                if folder in self.gone or self.before:
                    refresh_funnel(folder, parts)
            for record in records.values():
                refresh(record)

    def _note(self, runs: Iterable[Path]) -> None:
        """Write down what was found, before any of it is removed."""
        if not self.keys and not self.held:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        keys = sorted({*self.keys} | ({*self.query.keys} & self.query.matches))
        line = asdict(ForgetRecord(now, sorted(self.asked), keys, sorted(self.held)))
        alone = [folder for folder in self.gone if not (folder.parent / STAGES).is_file()]
        for folder in dict.fromkeys([*self.folders, *runs, *alone]):
            log = [
                old for old in read_forget_log(folder) if {*old.request_keys} >= self.asked.keys()
            ]
            told = {word for old in log for word in (*old.keys, *old.content_ids)}
            if not told.issuperset([*keys, *self.held]):
                append_lines(folder / FORGET_LOG, [line])


def refresh(record: Known) -> None:
    """Bring the record of a data stage up to date with its files; the ids that it had are kept."""
    entry, made = record.entry, record.provenance
    sizes = own_files(entry.outputs, record.place)
    for name in made.hashes:
        if (record.place / name).is_file():
            sizes[name] = (record.place / name).stat().st_size
    hashes = {name: digest(record.place / name) for name in sizes}
    ids = ids_of(entry.outputs, hashes)
    if ids == made.ids and hashes == made.hashes:
        return
    made.earlier.append(made.ids)
    made.ids, made.hashes, entry.file_sizes = ids, hashes, sizes
    if (record.place / ALONE).is_file():
        save_alone(record.place, entry)
        return
    path = record.place.parent / STAGES
    table = read_json(path)
    table["stages"][record.place.name] = table_of(entry)
    write_json(path, table)


def _quotes(work: _Work) -> list[str]:
    """The folders of stages that read what held it and made no data, and the reports of their
    runs.
    """
    made = DATA | {"tokenizer"}
    records = [r for r in work.registry.records if r.state != GONE]
    readers = [r for r in records if not made & r.entry.outputs.keys() and work.held & {*r.read()}]
    places = [r.place for r in readers]
    reports = [p.parent / name for p in places for name in (REPORT, SUMMARY)]
    return [str(p) for p in dict.fromkeys([*places, *(p for p in reports if p.is_file())])]


def _models(work: _Work) -> list[dict[str, Any]]:
    """The models, and tokenizers, that come from what held it."""
    return [
        {
            "name": record.name, "kind": record.entry.kind, "id": record.model or record.shown_id,
            "state": record.state, "place": str(record.place), "finished": record.finished,
            "again": _again(record),
        }
        for record in descendants(work.registry, work.held)
        if record.model or "tokenizer" in record.ids
    ]  # fmt: skip


def descendants(registry: Registry, held: Iterable[str]) -> list[Known]:
    """The stages that read what has one of these ids, and those that read what they left.

    Data that is still there was searched itself: only its earlier content, in ``held``, counts. A
    tokenizer learned words from it; what is only split by these is not counted.
    """
    ids, found, before = set(held), {}, -1
    while len(found) > before:
        before = len(found)
        for record in registry.records:
            if record.id not in found and ids & {*record.read()}:
                found[record.id] = record
                searched = record.state != GONE and DATA & record.ids.keys()
                if not searched and "tokenizer" not in record.ids:
                    ids |= {*record.held()}
    return [record for record in registry.records if record.id in found]


def _again(record: Known) -> str | None:
    """The command that makes a model again; None for one that a run has archived."""
    run = record.place.parent
    if PREVIOUS.fullmatch(run.name):
        return None
    if (run / "recipe.json").is_file():
        return f"fastlm run {run / 'recipe.json'} --out {run}"
    return record.provenance.command


def _places(roots: Iterable[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """The prepared folders, folders of shards and files of rows below the paths."""
    corpora, shards, rows = {}, {}, {}  # sets that keep their order
    for root in roots:
        if root.is_file():
            rows[root] = None
            continue
        for inner, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in INNER and not f.startswith("."))
            folder, parts = Path(inner), {TRAIN, HELDOUT} & {*files} if FUNNEL in files else set()
            if parts:
                corpora[folder] = None
            elif "index.json" in files and _is_shards(folder / "index.json"):
                shards[folder] = None
            for name in sorted({*files} - parts - NOT_ROWS):
                if is_json_lines(folder / name) and not name.startswith("."):
                    rows[folder / name] = None
    return list(corpora), list(shards), list(rows)


def _is_shards(index: Path) -> bool:
    try:
        return str(read_json(index).get("format", "")).startswith(SHARDS)
    except InputError:
        return False


def lines(report: Report, dry_run: bool) -> Iterator[str]:
    """The report as lines for a terminal."""
    verb = "would remove" if dry_run else "removed"
    for row in report.removed:
        several = "s" if row["count"] != 1 else ""
        yield f"{verb} {row['count']:,} {row['what']}{several}: {row['place']}"
    if report.database:
        yield f"{verb} {report.database:,} responses or conversations from the database"
    if not report.removed and not report.database:
        yield "nothing of it is left in the data here"
    for name in report.not_found:
        yield f"not found: {name}"
    for place in report.sources:
        yield f"its source may still have it, and is not changed: {place}"
    for row in report.elsewhere:
        what = "paragraph" if row["paragraphs"] == 1 else "paragraphs"
        yield (
            f"{row['paragraphs']} {what} of it also in {row['source']}: {row['id']}"
            f" ({row['place']}), which stays"
        )
    for place in report.quotes:
        yield f"may quote it (samples, items, reports), and is not changed: {place}"
    for doubt in report.unchecked:
        yield f"not checked: {doubt}"
    for model in report.models:
        verb = "learned its words from it" if model["kind"] == "tokenizer" else "saw it"
        state = f", {model['state']}" if model["state"] != "here" else ""
        yield f"{verb}: {model['name']} ({model['kind']}, id {model['id'][:12]}{state})"
    commands = [m["again"] for m in report.models if m["state"] != GONE and m["again"]]
    for command in dict.fromkeys(commands):
        yield f"to train without it: {command}"
