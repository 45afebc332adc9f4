"""The registry of runs: artifacts, their inputs and their folders. It consists of files, no server.

Records are in the folders of the runs (`fastlm.pipeline.provenance`), so they move and are copied
with them. `open_registry` reads all of them and appends new ones to the index,
``runs/index.jsonl``, one line per record. The index only grows: a deleted run stays in it as the
parent of other runs. If the index is deleted, the next scan writes it again, without deleted runs.
A lock lets one process append at a time. A truncated line is ignored.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import append_lines, reason
from fastlm.pipeline.provenance import (
    MODELS,
    Provenance,
    digest,
    json_hash,
    model_id,
    split_ids,
)
from fastlm.pipeline.record import RECORD, StageRecord, StageRecords, table_of
from fastlm.pipeline.run_folder import STAGES
from fastlm.schema import RelativePath, parse, read_document
from fastlm.sources.input_digest import InputDigest

INDEX = "index.jsonl"
SHORT = 12  # characters of an id that are shown
MIN_PREFIX = 4  # characters of an id in a query
PRESENT, CHANGED, DELETED = "present", "changed", "deleted"
SAMPLES = "samples"  # of a training's result: {"prompt", "sample", ...}
INNER = {"checkpoints", "node_modules", "__pycache__"}  # folders without records


@dataclass
class RunRecord:
    """The record of one finished stage. InputError: one without provenance.

    name: its folder, relative to the folder of runs.
    path: its folder.
    state: "present", "changed" (a file is missing or has another size) or "deleted".
    copies: names of other folders with the same record.
    """

    name: str
    path: Path
    entry: StageRecord
    state: str = PRESENT
    copies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.entry.provenance is None:
            raise InputError(f"{self.path}: provenance: expected a table, got nothing")
        self.provenance: Provenance = self.entry.provenance
        first_ids = (self.provenance.earlier_ids or [self.provenance.ids])[0]
        # of the work and its time, not of the folder
        self.id = json_hash(
            [self.entry.kind, self.entry.options, self.entry.seconds, self.provenance.finished_at,
             self.provenance.inputs, first_ids]
        )  # fmt: skip

    @property
    def runs(self) -> list[str]:
        """The names of its run and of the copies of that run."""
        return [name.rpartition("/")[0] or name for name in (self.name, *self.copies)]

    @property
    def run(self) -> str:
        return self.runs[0]

    @property
    def ids(self) -> dict[str, str]:
        """Type -> content id of its outputs."""
        return self.provenance.ids

    @property
    def model(self) -> str | None:
        """The content id of its model."""
        return next((self.ids[kind] for kind in MODELS if kind in self.ids), None)

    @property
    def short_id(self) -> str:
        return (self.model or next(iter(self.ids.values()), self.id))[:SHORT]

    @property
    def finished_at(self) -> str:
        return self.provenance.finished_at

    def output_ids(self) -> Iterator[str]:
        """Yield the ids and hashes of all its outputs, also those before rows were forgotten."""
        for ids in (self.ids, *self.provenance.earlier_ids, self.provenance.hashes):
            yield from ids.values()
        yield from self.split_ids

    @cached_property
    def split_ids(self) -> list[str]:
        """The ids of the splits of its corpus or shards, as they were recorded."""
        return list(split_ids(self.entry.outputs, self.provenance.hashes))

    def input_ids(self) -> Iterator[str]:
        """Yield the ids and hashes of all its inputs."""
        for inputs in self.provenance.inputs.values():
            yield from (id for input in inputs if (id := input["id"]))
        for source in self.provenance.sources:
            yield from source.get("files", {}).values()

    def table(self) -> dict[str, Any]:
        """Return the object that `fastlm runs --json` prints."""
        return {
            "name": self.name, "kind": self.entry.kind, "record": self.id, "ids": self.ids,
            "state": self.state, "path": str(self.path), "finished_at": self.finished_at,
            "seconds": self.entry.seconds,
        }  # fmt: skip


@dataclass
class IndexRow:
    """A line of the index."""

    name: RelativePath
    entry: StageRecord


@dataclass
class Registry:
    """All records, the newest last; ``warnings`` names records that cannot be read."""

    records: list[RunRecord]
    warnings: list[str] = field(default_factory=list)

    def maker(self, id: str | None, near: str = "") -> RunRecord | None:
        """Return the stage with an output of this id or hash. Of several, prefer one whose folder
        is in the path ``near``, then one that still exists.
        """
        location = Path(near).absolute() if near else None

        def rank(record: RunRecord) -> tuple[bool, ...]:
            near = location is not None and location.is_relative_to(record.path.absolute())
            return not near, id not in record.ids.values(), record.state == DELETED

        return min((r for r in self.records if id and id in r.output_ids()), key=rank, default=None)

    def parents(self, record: RunRecord) -> list[tuple[str, Mapping[str, Any], RunRecord | None]]:
        """Return (name, record, stage that made it) of each input of a stage."""
        rows = []
        for key, inputs in record.provenance.inputs.items():
            rows += [(key, input, self.maker(input["id"], input["path"])) for input in inputs]
        for source in record.provenance.sources:
            makers = [self.maker(digest) for digest in source.get("files", {}).values()]
            for maker in {m.id: m for m in makers if m is not None and m is not record}.values():
                rows.append(("data", {"name": source["spec"], "path": "", "id": None}, maker))
        return [(key, input, None if maker is record else maker) for key, input, maker in rows]

    def ancestors(self, record: RunRecord) -> list[RunRecord]:
        """Return a stage and all its ancestors, each once."""
        records, queue = {record.id: record}, [record]
        while queue:
            for _, _, maker in self.parents(queue.pop()):
                if maker is not None and maker.id not in records:
                    records[maker.id] = maker
                    queue.append(maker)
        return list(records.values())

    def find(self, name: str) -> list[RunRecord]:
        """The records that ``what`` names: a name, the name of a run, a path, or the beginning of
        an id. InputError: nothing is called that, or several unlike things.
        """
        for matches in (
            [r for r in self.records if name in (r.name, *r.copies)],
            [r for r in self.records if name in r.runs],
            self._at(name),
            [r for r in self.records if r.name.endswith(f"/{name}")],
            self._by_id(name.lower()),
        ):
            if not matches:
                continue
            if len({r.run for r in matches}) == 1:
                return matches
            names = ", ".join(f"{r.name} ({r.short_id})" for r in matches[:8])
            raise InputError(
                f"{name}: expected one run, stage or model, got {len(matches)}: {names}"
            )
        names = [r.name for r in self.records]
        near = difflib.get_close_matches(name, [*names, *(r.run for r in self.records)], 3, 0.3)
        hint = f"near: {', '.join(dict.fromkeys(near))}" if near else f"{len(names)} are known"
        raise InputError(
            f"{name}: expected a run, a stage, a model or the beginning of an id; {hint}"
        )

    def find_one(self, name: str) -> RunRecord:
        """Return one record. Of a run: its last model, else its last stage."""
        records = self.find(name)
        models = [r for r in records if "model" in r.ids or "model" in r.entry.outputs]
        return (models or records)[-1]

    def _at(self, name: str) -> list[RunRecord]:
        if not Path(name).exists():
            return []
        path = Path(name).absolute()
        existing = [(r.path.absolute(), r) for r in self.records if r.state != DELETED]
        inside = [(folder, r) for folder, r in existing if path.is_relative_to(folder)]
        innermost = max((len(folder.parts) for folder, _ in inside), default=0)
        return (
            [r for folder, r in inside if len(folder.parts) == innermost]
            or [r for folder, r in existing if folder.parent == path]
            or self._copied(path)
        )

    def _copied(self, path: Path) -> list[RunRecord]:
        """Return the stage that made the model or file of which ``path`` is a copy."""
        try:
            maker = self.maker(model_id(path, InputDigest(path / INDEX, cache=path)))
        except InputError:
            maker = self.maker(digest(path)) if path.is_file() else None
        return [maker] if maker else []

    def _by_id(self, prefix: str) -> list[RunRecord]:
        if len(prefix) < MIN_PREFIX or set(prefix) - set("0123456789abcdef"):
            return []

        def starts(id: str) -> bool:
            return id.startswith(prefix)

        by_record = [r for r in self.records if starts(r.id)]
        by_output = [r for r in self.records if any(map(starts, r.ids.values()))]
        return (
            by_record or by_output or [r for r in self.records if any(map(starts, r.output_ids()))]
        )


def open_registry(
    roots: Sequence[str | Path], *, paths: Iterable[str | Path] = (), update_index: bool = True
) -> Registry:
    """Read all records below ``roots`` and what their indexes know besides, and those of the runs
    and stages at ``paths`` with what they come from. ``note``: add what is new to the indexes,
    where they can be written. InputError: a root that is no folder.
    """
    records: dict[str, RunRecord] = {}
    warnings: list[str] = []
    for root in map(Path, roots):
        if not root.is_dir():
            raise InputError(f"{root}: expected a folder of runs, not found")
        scanned = list(_scan(root, root, warnings))
        for record in scanned:
            if (existing := records.get(record.id)) is None:
                records[record.id] = record
            elif existing.name != record.name:
                if existing.state != PRESENT and record.state == PRESENT:
                    existing, records[record.id] = record, record
                existing.copies.append(record.name)
        indexed = _read_index(root / INDEX, warnings)
        for record in indexed.values():
            records.setdefault(record.id, record)
        if update_index and not _is_record_folder(root):
            _note(root, scanned, indexed)
    _add_elsewhere(records, [Path(path) for path in paths], [*map(Path, roots)], warnings)
    return Registry(sorted(records.values(), key=lambda r: r.finished_at), warnings)


def _add_elsewhere(
    records: dict[str, RunRecord], paths: list[Path], roots: list[Path], warnings: list[str]
) -> None:
    """Add the records of the folders of ``paths``, unless they are below ``roots``, and of their
    inputs."""
    scanned = {root.absolute() for root in roots}
    while paths:
        path = paths.pop().absolute()
        parents = (path, *path.parents)
        folder = next(filter(_is_record_folder, parents), None)
        if folder is None or not path.exists() or scanned.intersection(parents):
            continue
        scanned.add(folder)
        for record in _scan(folder.parent, folder, warnings):
            if (existing := records.get(record.id)) is None or existing.state != PRESENT:
                records[record.id] = record
            inputs = record.provenance.inputs.values()
            paths += [Path(input["path"]) for inputs_of_key in inputs for input in inputs_of_key]


def index_run(out: Path) -> None:
    """Add the stages of a run to the index of its parent folder, if that has one or is runs/."""
    root = out.absolute().parent
    if root.name == "runs" or (root / INDEX).is_file():
        _note(root, _scan(root, out.absolute(), []), _read_index(root / INDEX, []))


def _note(root: Path, records: Iterable[RunRecord], indexed: Mapping[str, RunRecord]) -> None:
    """Append new records to the index. A folder that cannot be written has no index."""
    rows = [(indexed.get(r.id), _index_row(r)) for r in records]
    new = [row for old, row in rows if old is None or _index_row(old) != row]
    append_lines(root / INDEX, new, required=False)


def _index_row(record: RunRecord) -> dict[str, Any]:
    """Return the line of the index: the record without samples. Samples quote prompts of the data,
    and would stay when the run is deleted and its data forgotten."""
    entry = record.entry
    if entry.result is not None:
        entry = replace(entry, result={k: v for k, v in entry.result.items() if k != SAMPLES})
    return {"name": record.name, "entry": table_of(entry)}


def _is_record_folder(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (STAGES, RECORD))


def _scan(root: Path, folder: Path, warnings: list[str]) -> Iterator[RunRecord]:
    """Yield the records in and below ``folder``. Their names begin at ``root``."""
    for inner, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in INNER and not f.startswith("."))
        path = Path(inner)
        name = root.resolve().name if path == root else path.relative_to(root).as_posix()
        try:
            for file in (f for f in (STAGES, RECORD) if f in files):
                stages = read_document(path / file, StageRecords, extra="forbid").stages
                for stage, entry in stages.items():
                    if entry.file_sizes is not None and (path / stage).is_dir():
                        full = name if stage == "." else f"{name}/{stage}"
                        yield _present(full, path / stage, entry)
        except InputError as error:
            warnings.append(str(error))


def _present(name: str, path: Path, entry: StageRecord) -> RunRecord:
    """Return the record of a folder that exists."""
    sizes = {path / name: size for name, size in (entry.file_sizes or {}).items()}
    complete = all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())
    return RunRecord(name, path, entry, PRESENT if complete else CHANGED)


def _read_index(path: Path, warnings: list[str]) -> dict[str, RunRecord]:
    """Return the records of an index as deleted. If a record moved, its last line counts."""
    records: dict[str, RunRecord] = {}
    try:
        lines = path.read_text("utf-8", "replace").split("\n") if path.is_file() else []
    except OSError as error:
        warnings.append(f"{path}: cannot be read: {reason(error)}")
        return records
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(line, IndexRow, f"{path}:{number}", extra="forbid")
            record = RunRecord(row.name, path.parent / row.name, row.entry, DELETED)
        except InputError as error:
            warnings.append(f"{error}; ignored")
            continue
        records[record.id] = record
    return records
