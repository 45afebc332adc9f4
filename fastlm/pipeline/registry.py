"""The registry of runs: what was made, from what, and where it is. It is files, no server.

The records are in the folders of the runs (`fastlm.pipeline.provenance`), so that a run which is
moved or copied takes its own along. `open_registry` reads them all. What it finds it notes in the
index, ``runs/index.jsonl``, one line per record, which only grows: a run that has been deleted is
still known as the parent of what remains. The index can be deleted; the next scan writes it again,
without the runs that are gone. Processes append to it one after the other (a lock), and a line that
was cut off is left out.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import append_lines, reason
from fastlm.pipeline.provenance import MODELS, Provenance, digest, json_hash, model_id
from fastlm.pipeline.record import ALONE, Entry, Record, table_of
from fastlm.pipeline.run_folder import STAGES
from fastlm.schema import RelativePath, parse, read_document
from fastlm.sources.input_digest import InputDigest

INDEX = "index.jsonl"
SHORT = 12  # characters of an id that are shown
LEAST = 4  # characters of an id that is asked for
HERE, CHANGED, GONE = "here", "changed", "gone"
SAMPLES = "samples"  # of a training's result: {"prompt", "sample", ...}
INNER = {"checkpoints", "node_modules", "__pycache__"}  # folders without records


@dataclass
class Known:
    """One finished stage. ``name``: its folder, from the folder of runs. ``place``: its folder.
    ``state``: "here", "changed" (a file is missing or has another size) or "gone". ``copies``:
    names of other folders with the same record. InputError: an entry that does not say how.
    """

    name: str
    place: Path
    entry: Entry
    state: str = HERE
    copies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.entry.provenance is None:
            raise InputError(
                f"{self.place}: provenance: expected how the stage made this, got nothing"
            )
        self.provenance: Provenance = self.entry.provenance
        first_ids = (self.provenance.earlier or [self.provenance.ids])[0]
        # of what was done and when, not of where it is
        self.id = json_hash(
            [self.entry.kind, self.entry.options, self.entry.seconds, self.provenance.finished,
             self.provenance.inputs, first_ids]
        )  # fmt: skip

    @property
    def runs(self) -> list[str]:
        """The names of its run, and of the copies of that."""
        return [name.rpartition("/")[0] or name for name in (self.name, *self.copies)]

    @property
    def run(self) -> str:
        return self.runs[0]

    @property
    def ids(self) -> dict[str, str]:
        """Type -> content id of what it left."""
        return self.provenance.ids

    @property
    def model(self) -> str | None:
        """The content id of its model."""
        return next((self.ids[kind] for kind in MODELS if kind in self.ids), None)

    @property
    def shown_id(self) -> str:
        return (self.model or next(iter(self.ids.values()), self.id))[:SHORT]

    @property
    def finished(self) -> str:
        return self.provenance.finished

    def held(self) -> Iterator[str]:
        """The ids and hashes of everything that it left, also before rows were forgotten."""
        for ids in (self.ids, *self.provenance.earlier, self.provenance.hashes):
            yield from ids.values()

    def read(self) -> Iterator[str]:
        """The ids and hashes of everything that it read."""
        for reads in self.provenance.inputs.values():
            yield from (id for read in reads if (id := read["id"]))
        for source in self.provenance.sources:
            yield from source.get("files", {}).values()

    def table(self) -> dict[str, Any]:
        """What `fastlm runs --json` says of it."""
        return {
            "name": self.name, "kind": self.entry.kind, "record": self.id, "ids": self.ids,
            "state": self.state, "place": str(self.place), "finished": self.finished,
            "seconds": self.entry.seconds,
        }  # fmt: skip


@dataclass
class IndexRow:
    """A line of the index."""

    name: RelativePath
    entry: Entry


@dataclass
class Registry:
    """All records, the newest last; ``warnings`` names records that cannot be read."""

    records: list[Known]
    warnings: list[str] = field(default_factory=list)

    def maker(self, id: str | None, near: str = "") -> Known | None:
        """The stage that left what has this id or hash; of several, one whose folder is in the path
        ``near``, else the first that still exists, else the first.
        """
        at = Path(near).absolute() if near else None

        def rank(record: Known) -> tuple[bool, ...]:
            near = at is not None and at.is_relative_to(record.place.absolute())
            return not near, id not in record.ids.values(), record.state == GONE

        return min((r for r in self.records if id and id in r.held()), key=rank, default=None)

    def parents(self, record: Known) -> list[tuple[str, Mapping[str, Any], Known | None]]:
        """(input, what was read, its maker) of a stage."""
        found = []
        for key, reads in record.provenance.inputs.items():
            found += [(key, read, self.maker(read["id"], read["path"])) for read in reads]
        for source in record.provenance.sources:
            makers = [self.maker(digest) for digest in source.get("files", {}).values()]
            for maker in {m.id: m for m in makers if m is not None and m is not record}.values():
                found.append(("data", {"name": source["spec"], "path": "", "id": None}, maker))
        return [(key, read, None if maker is record else maker) for key, read, maker in found]

    def ancestors(self, record: Known) -> list[Known]:
        """A stage and all that it comes from, each once."""
        found, waiting = {record.id: record}, [record]
        while waiting:
            for _, _, maker in self.parents(waiting.pop()):
                if maker is not None and maker.id not in found:
                    found[maker.id] = maker
                    waiting.append(maker)
        return list(found.values())

    def find(self, what: str) -> list[Known]:
        """The records that ``what`` names: a name, the name of a run, a path, or the beginning of
        an id. InputError: nothing is called that, or several unlike things.
        """
        for named in (
            [r for r in self.records if what in (r.name, *r.copies)],
            [r for r in self.records if what in r.runs],
            self._at(what),
            [r for r in self.records if r.name.endswith(f"/{what}")],
            self._by_id(what.lower()),
        ):
            if not named:
                continue
            if len({r.run for r in named}) == 1:
                return named
            names = ", ".join(f"{r.name} ({r.shown_id})" for r in named[:8])
            raise InputError(f"{what}: expected one run, stage or model, got {len(named)}: {names}")
        names = [r.name for r in self.records]
        near = difflib.get_close_matches(what, [*names, *(r.run for r in self.records)], 3, 0.3)
        hint = f"near: {', '.join(dict.fromkeys(near))}" if near else f"{len(names)} are known"
        raise InputError(
            f"{what}: expected a run, a stage, a model or the beginning of an id; {hint}"
        )

    def find_one(self, what: str) -> Known:
        """One record: of a run, its last model, else its last stage."""
        found = self.find(what)
        models = [r for r in found if "model" in r.ids or "model" in r.entry.outputs]
        return (models or found)[-1]

    def _at(self, what: str) -> list[Known]:
        if not Path(what).exists():
            return []
        path = Path(what).absolute()
        here = [(r.place.absolute(), r) for r in self.records if r.state != GONE]
        inside = [(place, r) for place, r in here if path.is_relative_to(place)]
        innermost = max((len(place.parts) for place, _ in inside), default=0)
        return (
            [r for place, r in inside if len(place.parts) == innermost]
            or [r for place, r in here if place.parent == path]
            or self._copied(path)
        )

    def _copied(self, path: Path) -> list[Known]:
        """What made the copy of a model, or of a file, at ``path``."""
        try:
            maker = self.maker(model_id(path, InputDigest(path / INDEX, cache=path)))
        except InputError:
            maker = self.maker(digest(path)) if path.is_file() else None
        return [maker] if maker else []

    def _by_id(self, start: str) -> list[Known]:
        if len(start) < LEAST or set(start) - set("0123456789abcdef"):
            return []

        def starts(id: str) -> bool:
            return id.startswith(start)

        own = [r for r in self.records if starts(r.id)]
        made = [r for r in self.records if any(map(starts, r.ids.values()))]
        return own or made or [r for r in self.records if any(map(starts, r.held()))]


def open_registry(
    roots: Sequence[str | Path], *, paths: Iterable[str | Path] = (), note: bool = True
) -> Registry:
    """Read all records below ``roots`` and what their indexes know besides, and those of the runs
    and stages at ``paths`` with what they come from. ``note``: add what is new to the indexes,
    where they can be written. InputError: a root that is no folder.
    """
    records: dict[str, Known] = {}
    warnings: list[str] = []
    for root in map(Path, roots):
        if not root.is_dir():
            raise InputError(f"{root}: expected a folder of runs, not found")
        here = list(_scan(root, root, warnings))
        for made in here:
            if (known := records.get(made.id)) is None:
                records[made.id] = made
            elif known.name != made.name:
                if known.state != HERE and made.state == HERE:
                    known, records[made.id] = made, made
                known.copies.append(made.name)
        indexed = _read_index(root / INDEX, warnings)
        for made in indexed.values():
            records.setdefault(made.id, made)
        if note and not _is_record_folder(root):
            _note(root, here, indexed)
    _add_elsewhere(records, [Path(path) for path in paths], [*map(Path, roots)], warnings)
    return Registry(sorted(records.values(), key=lambda r: r.finished), warnings)


def _add_elsewhere(
    records: dict[str, Known], paths: list[Path], roots: list[Path], warnings: list[str]
) -> None:
    """Add the records of the folders that ``paths`` are in, unless they are below ``roots``, and of
    what they read."""
    scanned = {root.absolute() for root in roots}
    while paths:
        path = paths.pop().absolute()
        places = (path, *path.parents)
        folder = next(filter(_is_record_folder, places), None)
        if folder is None or not path.exists() or scanned.intersection(places):
            continue
        scanned.add(folder)
        for made in _scan(folder.parent, folder, warnings):
            if (known := records.get(made.id)) is None or known.state != HERE:
                records[made.id] = made
            reads = made.provenance.inputs.values()
            paths += [Path(read["path"]) for given in reads for read in given]


def note_run(out: Path) -> None:
    """Add the stages of one run to the index beside it, if there is one or the folder is runs/."""
    root = out.absolute().parent
    if root.name == "runs" or (root / INDEX).is_file():
        _note(root, _scan(root, out.absolute(), []), _read_index(root / INDEX, []))


def _note(root: Path, records: Iterable[Known], indexed: Mapping[str, Known]) -> None:
    """Append what is new to the index. A folder that cannot be written has none."""
    rows = [(indexed.get(r.id), _index_row(r)) for r in records]
    new = [row for old, row in rows if old is None or _index_row(old) != row]
    append_lines(root / INDEX, new, required=False)


def _index_row(record: Known) -> dict[str, Any]:
    """What an index has of a record: all but samples, which quote prompts of the data, and would
    be kept when the run is deleted and its data forgotten."""
    entry = record.entry
    if entry.result is not None:
        entry = replace(entry, result={k: v for k, v in entry.result.items() if k != SAMPLES})
    return {"name": record.name, "entry": table_of(entry)}


def _is_record_folder(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (STAGES, ALONE))


def _scan(root: Path, folder: Path, warnings: list[str]) -> Iterator[Known]:
    """The records in and below ``folder``; their names begin at ``root``."""
    for inner, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in INNER and not f.startswith("."))
        place = Path(inner)
        name = root.resolve().name if place == root else place.relative_to(root).as_posix()
        try:
            for file in (f for f in (STAGES, ALONE) if f in files):
                stages = read_document(place / file, Record, extra="forbid").stages
                for stage, entry in stages.items():
                    if entry.file_sizes is not None and (place / stage).is_dir():
                        full = name if stage == "." else f"{name}/{stage}"
                        yield _present(full, place / stage, entry)
        except InputError as error:
            warnings.append(str(error))


def _present(name: str, place: Path, entry: Entry) -> Known:
    """The record of a folder that is there."""
    sizes = {place / name: size for name, size in (entry.file_sizes or {}).items()}
    whole = all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())
    return Known(name, place, entry, HERE if whole else CHANGED)


def _read_index(path: Path, warnings: list[str]) -> dict[str, Known]:
    """The records that an index knows, as gone; of a record that moved, the last line."""
    found: dict[str, Known] = {}
    try:
        lines = path.read_text("utf-8", "replace").split("\n") if path.is_file() else []
    except OSError as error:
        warnings.append(f"{path}: cannot be read: {reason(error)}")
        return found
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(line, IndexRow, f"{path}:{number}", extra="forbid")
            record = Known(row.name, path.parent / row.name, row.entry, GONE)
        except InputError as error:
            warnings.append(f"{error}; left out")
            continue
        found[record.id] = record
    return found
