"""Forget documents and conversations: in prepared folders, token shards, rows to train on and the
feedback database; and list the models that saw them.

The matches are first written to the forget log (`fastlm.data.forget_log`), then removed: from the
database, then the token shards that were made of them, then rows and the records of removed
documents, and last from the prepared folders, because the others are found by these. So, after a
kill, the same command finishes the work, and it lists the same models after everything is removed.

Rejected: to search and rewrite shards. That needs their tokenizer, and a training has to start
again in any case; `fastlm data shards` makes them from the remaining text.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.corpus import (
    PLAN,
    REMOVED,
    SPLITS,
    SUFFIX,
    UNFINISHED_SHARDS,
    UNITS,
    is_part_name,
    list_parts,
    read_documents,
)
from fastlm.data.corpus_forget import (
    FileHits,
    ForgetQuery,
    add_near_copies,
    is_json_lines,
    paragraph_keys,
    refresh_funnel,
    refresh_units,
    remaining_copies,
    remove_card,
    remove_lines,
    removed_copies,
    search_corpus,
    search_removed,
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
from fastlm.data.options import WORK
from fastlm.errors import InputError
from fastlm.files import append_lines, read_json, write_json
from fastlm.pipeline.archive import PREVIOUS
from fastlm.pipeline.funnel import FUNNEL
from fastlm.pipeline.provenance import artifact_id, digest, ids_of, output_files
from fastlm.pipeline.record import RECORD, save_stage_record, table_of
from fastlm.pipeline.registry import (
    CHANGED,
    DELETED,
    INDEX,
    INNER,
    PRESENT,
    Registry,
    RunRecord,
    open_registry,
)
from fastlm.pipeline.report import REPORT, SUMMARY
from fastlm.pipeline.run import locked
from fastlm.pipeline.run_folder import STAGES
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

DATA = {"corpus", "shards"}  # types of data that are searched themselves
NOT_ROWS = {INDEX, FORGET_LOG, "metrics.jsonl"}
SHARDS = "fastlm-shards-"


@dataclass
class ForgetReport:
    """The result of `forget`, or of a dry run.

    removed: per path, the kind of what was removed and a count. database: how many responses and
    conversations were removed from the database. not_found: targets without a match. unchecked:
    places that could not be checked. elsewhere: documents that share paragraphs with what was
    removed. near_copies: the removed documents that are near copies of others. sources: files and
    packages that still have it. quotes: what may quote it (samples of
    trainings, items of evaluations, reports). models: models that saw it.
    """

    removed: list[dict[str, Any]] = field(default_factory=list)
    database: int = 0
    not_found: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    elsewhere: list[dict[str, Any]] = field(default_factory=list)
    near_copies: list[dict[str, Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    quotes: list[str] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_incomplete(self) -> bool:
        """Whether a model that saw it still exists, or a place could not be checked."""
        return bool(self.unchecked) or any(m["state"] != DELETED for m in self.models)


def forget(
    paths: Sequence[str | Path],
    names: Sequence[str] = (),
    *,
    keys: Iterable[str] = (),
    store: "FeedbackStore | None" = None,
    near: bool = False,
    dry_run: bool = False,
) -> ForgetReport:
    """Remove the targets from everything below ``paths``.

    Args:
        paths: folders of runs, prepared folders, files of rows.
        names: ids of documents, responses or conversations, URLs, paths, sources, SHA-256 of texts.
        keys: keys of `fastlm.data.forget_log`, such as those of withdrawn consent.
        store: a feedback database, in which ``names`` are responses and conversations.
        near: also remove the near copies of the documents in prepared folders (word 5-grams, a
            Jaccard similarity of 0.8 or more), and let later builds leave them out. A name that is
            a file stands for its text, too.
        dry_run: change nothing.

    InputError: no target, a path that is missing, a run that is at work, damaged data.
    """
    if not names and not keys and store is None:
        raise InputError("target: expected something to forget, got nothing")
    roots = [Path(path) for path in paths]
    for root in roots:
        if not (root.is_dir() or (root.is_file() and is_json_lines(root))):
            got = "another file" if root.exists() else "nothing"
            raise InputError(f"{root}: expected a folder or a file of JSON lines, got {got}")
    removal = _Removal(roots, names, keys, store, near)
    removal.search()
    if not dry_run:
        removal.remove()
    removal.report.not_found = removal.missing_names()
    removal.report.quotes = _quotes(removal)
    removal.report.models = _models(removal)
    return removal.report


class _Removal:
    """A search and what it found. ``content_ids``: ids of the data that has, or had, a match."""

    def __init__(
        self, roots: list[Path], names: Sequence[str], keys: Iterable[str],
        store: "FeedbackStore | None", near: bool = False,
    ):  # fmt: skip
        self.roots, self.names, self.store, self.near = roots, names, store, near
        self.folders = list(dict.fromkeys(r if r.is_dir() else r.parent for r in roots))
        self.requests = {request_key(name): name for name in names}
        # what earlier calls found under the same names or keys
        self.places = _find_data(roots)
        logs = dict.fromkeys([*self.folders, *self.places[0]])
        log = [line for folder in logs for line in read_forget_log(folder)]
        same = [line for line in log if self.requests.keys() & {*line.request_keys}]
        self.earlier = [line for line in log if line in same or {*keys} & {*line.keys}]
        query_keys = {*keys, *(key for line in same for key in line.keys)}
        # of texts that an earlier call for the same targets has removed
        self.signatures = {s for line in self.earlier for s in line.signatures if near}
        for name in names:
            query_keys |= {response_key(name), conversation_key(name)}
            if store is not None:
                query_keys |= {*store.withdrawn_keys(name), *store.keys_of(name)}
        sums = frozenset(name.lower() for name in names if re.fullmatch("(?i)[0-9a-f]{64}", name))
        paths = {str(Path(name).absolute()) for name in names if Path(name).exists()}
        self.query = ForgetQuery(frozenset([*names, *paths]), sums, frozenset(query_keys))
        self.registry = open_registry(self.folders, update_index=False)
        self.report = ForgetReport()
        self.corpora: dict[Path, dict[str, list[FileHits]]] = {}
        self.removed_records: list[FileHits] = []
        self.input_digest = InputDigest(Path(os.devnull), cache=Path(os.devnull))
        self.shards: list[Path] = []
        self.rows: list[FileHits] = []
        self.keys: set[str] = set()
        self.content_ids: set[str] = {id for line in self.earlier for id in line.content_ids}

    # ---- search

    def search(self) -> None:
        corpora, shards, rows, builds = self.places
        self.report.unchecked += [
            f"{folder}: an unfinished build may have it: finish it (fastlm data prepare) or delete"
            " this folder, then repeat this command"
            for folder in builds
        ]
        for folder in corpora:
            files = search_corpus(folder, self.query, after_kill=bool(self.earlier))
            self.corpora[folder] = files
        if self.near:
            self._search_near()
        for folder, files in self.corpora.items():
            if self._add_hits("document", folder, self._files(folder)):
                self.content_ids |= self._ids("corpus", folder)
            for split, hits in files.items():
                if (folder / split).is_dir() and any(h.line_numbers for h in hits):
                    self.content_ids |= self._ids("corpus", folder / split)
        for folder in corpora:
            names = [f"{s} {id}" for file in self._files(folder) for s, id in file.documents]
            copies = removed_copies(folder, names, near=self.near)
            hits = search_removed(folder, self.query, self.keys, self.texts, copies)
            self._add_hits("record of a removed document", folder / REMOVED, hits)
            self.removed_records += [file for file in hits if file.line_numbers]
        for path in rows:
            hits = search_rows(path, self.query)
            if self._add_hits("row", path, [hits]):
                self.rows.append(hits)
        for folder in shards:
            corpora, record = self._corpora_of(folder), self._record(folder)
            # made of text from which an earlier call removed something
            stale = record is not None and not self.content_ids.isdisjoint(record.input_ids())
            if stale or corpora & self.affected.keys():
                self.shards.append(folder)
                self.content_ids |= self._ids("shards", folder)
                if folder.name in ("train", "heldout"):
                    self.content_ids |= self._ids("shards", folder.parent)
                self._add_removed("set of token shards", folder, 1)
            elif not corpora or (record is None and self.earlier):
                reason = "its prepared text is not here, so that its documents are unknown"
                if corpora:
                    reason = "no record tells whether it was made before documents were removed"
                self.report.unchecked.append(f"{folder}: {reason}")
        self.report.unchecked += [
            f"{folder}: token shards beside the text, which may have it: repeat this command with"
            " this folder, too"
            for folder in self._shards_beside()
        ]
        if self.store is not None:
            self.report.database = sum(bool(self.store.keys_of(name)) for name in self.names)
        self._search_elsewhere()

    def _shards_beside(self) -> Iterator[Path]:
        """Yield the folders of token shards that stand beside a prepared folder, were not searched,
        and are made of it or do not record of what.
        """
        searched = {root.absolute() for root in self.roots if root.is_dir()}
        corpora = [c.absolute() for c in (self.corpora if self.earlier else self.affected)]
        for parent in sorted({corpus.parent for corpus in corpora}):
            for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
                places = [folder / name for name in ("", *SPLITS)]
                if not searched.isdisjoint([folder, *folder.parents]) or not any(
                    _is_shards(p / "index.json") or (p / UNFINISHED_SHARDS).is_dir() for p in places
                ):
                    continue
                records = open_registry([folder], update_index=False).records
                inputs = [i for r in records for rows in r.provenance.inputs.values() for i in rows]
                # of this text, or of what was in this folder before
                made_of = {i["id"] for i in inputs} & self.content_ids
                made_of |= {i["path"] for i in inputs} & {*map(str, corpora)}
                if made_of or not records:
                    yield folder

    def _search_near(self) -> None:
        """Add the near copies of what was found, and of files that are targets."""
        from fastlm.data.near_copies import NearCopies, signature_of
        from fastlm.data.texts import read_texts

        files = {}
        for name in filter(os.path.isfile, self.names):
            with suppress(InputError):  # no text: then it is only a name
                files[name] = [*read_texts(name)]
        texts = [*self.texts, *(text for texts in files.values() for text in texts)]
        # copies that an earlier call logged: copies of copies are not to be forgotten
        logged = NearCopies(signatures=self.signatures).similarities(texts)
        texts = [text for text, similarity in zip(texts, logged) if not similarity]
        copies = NearCopies(texts, self.signatures)
        self.signatures |= {*filter(None, map(signature_of, texts))}
        self.query.matches |= files.keys()
        for folder in self.corpora:
            others = remaining_copies(folder, self.query)
            for hits in self._files(folder):
                near_copies = add_near_copies(hits, copies, others)
                self.report.near_copies += [copy._asdict() for copy in near_copies]

    def _add_hits(self, kind: str, path: Path, files: Iterable[FileHits]) -> bool:
        """Note what to remove from a place; return whether there is anything."""
        hit = [hits for hits in files if hits.line_numbers]
        for hits in hit:
            self.keys |= hits.keys
            self.content_ids.add(digest(hits.path))
        if hit:
            self._add_removed(kind, path, sum(len(hits.line_numbers) for hits in hit))
        return bool(hit)

    def _add_removed(self, kind: str, path: Path, count: int) -> None:
        self.report.removed.append({"path": str(path), "kind": kind, "count": count})

    @property
    def affected(self) -> dict[Path, list[FileHits]]:
        """The prepared folders from which documents are removed, with their files."""
        all_files = {folder: self._files(folder) for folder in self.corpora}
        return {
            folder: files
            for folder, files in all_files.items()
            if any(hits.line_numbers for hits in files)
        }

    @property
    def changed_corpora(self) -> list[Path]:
        """The prepared folders from which documents, or records of removed ones, are removed."""
        records = (hits.path.parent.parent for hits in self.removed_records)
        return list(dict.fromkeys([*self.affected, *records]))

    def _files(self, folder: Path) -> list[FileHits]:
        """Return what was found in the files of a prepared folder."""
        return [hits for files in self.corpora[folder].values() for hits in files]

    @property
    def texts(self) -> list[str]:
        """The texts of the documents that are removed."""
        return [text for files in self.affected.values() for hits in files for text in hits.texts]

    def _ids(self, kind: str, folder: Path) -> set[str]:
        """Return the content ids of a data folder: now, and by its record."""
        record = self._record(folder)
        ids = {record.ids[kind]} if record is not None and kind in record.ids else set()
        return ids | {artifact_id((kind,), folder, self.input_digest)}

    def _record(self, folder: Path) -> RunRecord | None:
        """Return the record of the stage that this folder belongs to."""
        records = [
            r
            for r in self.registry.records
            if r.state != DELETED and folder.absolute().is_relative_to(r.path.absolute())
        ]
        return max(records, key=lambda r: len(r.path.parts), default=None)

    def _corpora_of(self, folder: Path) -> set[Path]:
        """Return the prepared folders that these shards were made of, of those that were
        searched."""
        corpora = {c.absolute(): c for c in self.corpora}
        if (record := self._record(folder)) is None:
            return {c for c in self.corpora if folder.is_relative_to(c.parent)}
        makers = [maker for key, _, maker in self.registry.parents(record) if key == "corpus"]
        paths = [maker.path.absolute() for maker in makers if maker is not None]
        return {corpora[path] for path in paths if path in corpora}

    def _search_elsewhere(self) -> None:
        """Find the paragraphs of the removed documents in documents that stay, and the sources that
        still have them.
        """
        paragraphs = paragraph_keys(self.texts)
        files = [(folder, hits) for folder in self.corpora for hits in self._files(folder)]
        for folder, hits in files if paragraphs else ():
            for number, document in enumerate(read_documents(hits.path)):
                shared = paragraphs & paragraph_keys([document.text])
                if shared and number not in hits.line_numbers:
                    self.report.elsewhere.append({
                        "path": str(folder), "source": document.source, "id": document.id,
                        "paragraphs": len(shared),
                    })  # fmt: skip
        files = [hits for affected in self.affected.values() for hits in affected]
        documents = [d for hits in (*files, *self.removed_records) for d in hits.documents]
        self.report.sources = list(dict.fromkeys(f"{source}: {id}" for source, id in documents))

    def missing_names(self) -> list[str]:
        """Return the names without a match, now or earlier."""
        requests = (key for line in self.earlier for key in line.request_keys)
        matches = {*self.query.matches, *filter(None, map(self.requests.get, requests))}
        return [
            name
            for name in self.names
            if matches.isdisjoint([
                name, str(Path(name).absolute()), name.lower(), response_key(name),
                conversation_key(name),
            ])
            and not (self.store is not None and self.store.withdrawn_keys(name))
        ]  # fmt: skip

    # ---- removal

    def remove(self) -> None:
        from fastlm.data.shards import remove_shards

        folders = [*self.changed_corpora, *self.shards]
        records = {r.id: r for folder in folders if (r := self._record(folder))}
        # also the records of data that an earlier, killed call rewrote
        for record in self.registry.records:
            is_ours = DATA & record.ids.keys() and self.content_ids & {*record.output_ids()}
            if is_ours and record.state == CHANGED:
                records[record.id] = record
        runs = {r.path.parent for r in records.values() if (r.path.parent / STAGES).is_file()}
        with ExitStack() as stack:
            for run in sorted(runs):
                stack.enter_context(locked(run))
            self._write_log(runs)
            if self.store is not None:
                for name in self.names:
                    self.store.forget(name)
            for folder in self.shards:
                remove_shards(folder)
            corpora = [hits for files in self.affected.values() for hits in files]
            in_corpora = (hits for hits in corpora if hits.line_numbers)
            for hits in (*self.rows, *self.removed_records, *in_corpora):
                remove_lines(hits)
            for folder in {hits.path.parent.parent for hits in self.removed_records}:
                remove_card(folder)
            for folder, files in self.corpora.items():
                if folder in self.affected or self.earlier:
                    remove_card(folder)
                    refresh_units(folder, files)
                    refresh_funnel(folder, files)
            for record in records.values():
                refresh_record(record)

    def _write_log(self, runs: Iterable[Path]) -> None:
        """Write the matches to the forget log, before any of them is removed."""
        if not self.keys and not self.content_ids and not self.signatures:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        keys = sorted({*self.keys} | ({*self.query.keys} & self.query.matches))
        line = asdict(ForgetRecord(
            now, sorted(self.requests), keys, sorted(self.content_ids), sorted(self.signatures)
        ))  # fmt: skip
        without_run = [f for f in self.changed_corpora if not (f.parent / STAGES).is_file()]
        for folder in dict.fromkeys([*self.folders, *runs, *without_run]):
            log = [r for r in read_forget_log(folder) if {*r.request_keys} >= self.requests.keys()]
            hashes = {hash for r in log for hash in (*r.keys, *r.content_ids, *r.signatures)}
            if not hashes.issuperset([*keys, *self.content_ids, *self.signatures]):
                append_lines(folder / FORGET_LOG, [line])


def refresh_record(record: RunRecord) -> None:
    """Update the record of a data stage to its files. Its earlier ids stay in the record."""
    entry, provenance = record.entry, record.provenance
    sizes = output_files(entry.outputs, record.path)
    for name in provenance.hashes:
        if (record.path / name).is_file():
            sizes[name] = (record.path / name).stat().st_size
    hashes = {name: digest(record.path / name) for name in sizes}
    ids = ids_of(entry.outputs, hashes)
    if ids == provenance.ids and hashes == provenance.hashes:
        return
    provenance.earlier_ids.append(provenance.ids)
    provenance.ids, provenance.hashes, entry.file_sizes = ids, hashes, sizes
    if (record.path / RECORD).is_file():
        save_stage_record(record.path, entry)
        return
    path = record.path.parent / STAGES
    table = read_json(path)
    table["stages"][record.path.name] = table_of(entry)
    write_json(path, table)


def _quotes(removal: _Removal) -> list[str]:
    """Return the folders of stages that read affected data and have no data as output, and the
    reports of their runs.
    """
    data = DATA | {"tokenizer"}
    records = [r for r in removal.registry.records if r.state != DELETED]
    readers = [
        r
        for r in records
        if not data & r.entry.outputs.keys() and removal.content_ids & {*r.input_ids()}
    ]
    paths = [r.path for r in readers]
    reports = [p.parent / name for p in paths for name in (REPORT, SUMMARY)]
    return [str(p) for p in dict.fromkeys([*paths, *(p for p in reports if p.is_file())])]


def _models(removal: _Removal) -> list[dict[str, Any]]:
    """Return the models and tokenizers that descend from affected data."""
    return [
        {
            "name": record.name, "kind": record.entry.kind, "id": record.model or record.short_id,
            "state": record.state, "path": str(record.path), "finished_at": record.finished_at,
            "retrain_command": _retrain_command(record),
        }
        for record in descendants(removal.registry, removal.content_ids)
        if record.model or "tokenizer" in record.ids
    ]  # fmt: skip


def descendants(registry: Registry, content_ids: Iterable[str]) -> list[RunRecord]:
    """Return the stages that read something with one of these ids, and those that read the outputs
    of these stages.

    Data that still exists was searched itself: only its earlier content, in ``content_ids``,
    counts. A tokenizer learned words from the text; a text that it only splits does not count.
    """
    ids, records, before = set(content_ids), {}, -1
    while len(records) > before:
        before = len(records)
        for record in registry.records:
            if record.id not in records and ids & {*record.input_ids()}:
                records[record.id] = record
                searched = record.state != DELETED and DATA & record.ids.keys()
                if not searched and "tokenizer" not in record.ids:
                    ids |= {*record.output_ids()}
    return [record for record in registry.records if record.id in records]


def _retrain_command(record: RunRecord) -> str | None:
    """Return the command that trains a model again; None for one that a run has archived."""
    run = record.path.parent
    if PREVIOUS.fullmatch(run.name):
        return None
    if (run / "recipe.json").is_file():
        return f"fastlm run {run / 'recipe.json'} --out {run}"
    return record.provenance.command


def _find_data(
    roots: Iterable[Path],
) -> tuple[list[Path], list[Path], list[Path], list[Path]]:
    """Return the prepared folders, folders of shards, files of rows and unfinished builds of
    corpora below the paths.
    """
    corpora, shards, rows, builds = {}, {}, {}, {}  # sets that keep their order
    for root in roots:
        if root.is_file():
            rows[root] = None
            continue
        for inner, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in INNER and not f.startswith("."))
            folder, parts = Path(inner), set[str]()
            if WORK in folders and (folder / WORK / PLAN).is_file():
                folders.remove(WORK)
                builds[folder / WORK] = None
            if FUNNEL in files:
                parts = {f"{split}{SUFFIX}" for split in SPLITS} & {*files}
                if parts or UNITS in files or any(list_parts(folder / split) for split in SPLITS):
                    corpora[folder] = None
            if folder.parent in corpora and folder.name in (*SPLITS, REMOVED):
                parts = set(filter(is_part_name, files))
            is_finished = "index.json" in files and _is_shards(folder / "index.json")
            if is_finished or (folder / UNFINISHED_SHARDS).is_dir():
                shards[folder] = None
            for name in sorted({*files} - parts - NOT_ROWS):
                if is_json_lines(folder / name) and not name.startswith("."):
                    rows[folder / name] = None
    return list(corpora), list(shards), list(rows), list(builds)


def _is_shards(index: Path) -> bool:
    try:
        return str(read_json(index).get("format", "")).startswith(SHARDS)
    except InputError:
        return False


def report_lines(report: ForgetReport, dry_run: bool) -> Iterator[str]:
    """Yield the report as lines for a terminal."""
    verb = "would remove" if dry_run else "removed"
    for row in report.removed:
        plural = "s" if row["count"] != 1 else ""
        yield f"{verb} {row['count']:,} {row['kind']}{plural}: {row['path']}"
    if report.database:
        yield f"{verb} {report.database:,} responses or conversations from the database"
    if not report.removed and not report.database:
        yield "nothing to remove: the data here has none of it"
    for row in report.near_copies:
        yield (
            f"near copy ({row['similarity']:.2f}), {verb}: {row['source']}: {row['id']}"
            f" ({row['path']})"
        )
    for name in report.not_found:
        yield f"not found: {name}"
    for source in report.sources:
        yield f"its source may still have it, and is not changed: {source}"
    for row in report.elsewhere:
        noun = "paragraph" if row["paragraphs"] == 1 else "paragraphs"
        yield (
            f"{row['paragraphs']} {noun} of it also in {row['source']}: {row['id']}"
            f" ({row['path']}), which stays"
        )
    for path in report.quotes:
        yield f"may quote it (samples, items, reports), and is not changed: {path}"
    for message in report.unchecked:
        yield f"not checked: {message}"
    for model in report.models:
        verb = "learned its words from it" if model["kind"] == "tokenizer" else "saw it"
        state = f", {model['state']}" if model["state"] != PRESENT else ""
        yield f"{verb}: {model['name']} ({model['kind']}, id {model['id'][:12]}{state})"
    commands = [m["retrain_command"] for m in report.models if m["state"] != DELETED]
    for command in dict.fromkeys(filter(None, commands)):
        yield f"to train without it: {command}"
