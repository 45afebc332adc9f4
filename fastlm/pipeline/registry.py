"""The registry of runs: what was made, from what, and where it is. It is files, no server.

The records are in the folders of the runs (`fastlm.pipeline.provenance`), so that a run which is
moved or copied takes its own along. `open_registry` reads them all. What it finds it notes in the
index, ``runs/index.jsonl``, one line per record, which only grows: a run that has been deleted is
still known as the parent of what remains. The index can be deleted; the next scan writes it again,
without the runs that are gone. Processes append to it one after the other (a lock), and a line that
was cut off is left out.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import append_lines, reason
from fastlm.pipeline.content_id import MODELS
from fastlm.pipeline.provenance import Made, digest, model_id
from fastlm.pipeline.record import ALONE, Entry, Record, load_alone, table_of
from fastlm.pipeline.run_folder import STAGES
from fastlm.schema import RelativePath, parse, read_document
from fastlm.sources.input_digest import Contents

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
    names of other folders with the same record.
    """

    id: str
    name: str
    place: Path
    entry: Entry
    state: str = HERE
    copies: list[str] = field(default_factory=list)

    @property
    def run(self) -> str:
        return self.name.rpartition("/")[0] or self.name

    @property
    def runs(self) -> set[str]:
        """The names of its run, and of the copies of that."""
        return {name.rpartition("/")[0] or name for name in (self.name, *self.copies)}

    @property
    def ids(self) -> dict[str, str]:
        """Type -> content id of what it left."""
        return self.made.ids

    @property
    def made(self) -> Made:
        """From what and how: every finished stage has it (`_check_made`)."""
        assert self.entry.made is not None
        return self.entry.made

    @property
    def model(self) -> str | None:
        """The content id of its model."""
        return next((self.ids[kind] for kind in MODELS if kind in self.ids), None)

    @property
    def shown_id(self) -> str:
        return (self.model or next(iter(self.ids.values()), self.id))[:SHORT]

    @property
    def finished(self) -> str:
        return self.made.finished

    def held(self) -> Iterator[str]:
        """The ids and hashes of everything that it left, also before rows were forgotten."""
        for ids in (self.made.ids, *self.made.earlier, self.made.hashes):
            yield from ids.values()

    def read(self) -> Iterator[str]:
        """The ids and hashes of everything that it read."""
        for reads in self.made.reads.values():
            yield from (id for read in reads if (id := read["id"]))
        for source in self.made.sources:
            yield from source.get("files", {}).values()


@dataclass
class IndexRow:
    """A line of the index."""

    id: str
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
        if not id:
            return None
        made = [r for r in self.records if id in r.held()]
        at = Path(near).absolute() if near else None
        closer = [r for r in made if at and at.is_relative_to(r.place.absolute())]
        made = closer or [r for r in made if id in r.ids.values()] or made
        return next(iter([r for r in made if r.state != GONE] or made), None)

    def parents(self, record: Known) -> list[tuple[str, Mapping[str, Any], Known | None]]:
        """(input, what was read, its maker) of a stage."""
        found = []
        for key, reads in record.made.reads.items():
            found += [(key, read, self.maker(read["id"], read["path"])) for read in reads]
        for source in record.made.sources:
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
            raise InputError(f"{what}: wanted one run, stage or model, got {len(named)}: {names}")
        names = [r.name for r in self.records]
        near = difflib.get_close_matches(what, [*names, *(r.run for r in self.records)], 3, 0.3)
        hint = f"near: {', '.join(dict.fromkeys(near))}" if near else f"{len(names)} are known"
        raise InputError(
            f"{what}: wanted a run, a stage, a model or the beginning of an id; {hint}"
        )

    def find_one(self, what: str) -> Known:
        """One record: of a run, its last model, else its last stage."""
        found = self.find(what)
        models = [r for r in found if "model" in r.ids or "model" in r.entry.leaves]
        return (models or found)[-1]

    def _at(self, what: str) -> list[Known]:
        path = Path(what)
        if not path.exists():
            return []
        path = path.absolute()
        inside = [r for r in self.records if path.is_relative_to(r.place.absolute())]
        inside = [r for r in inside if r.state != GONE]
        if inside:  # the innermost
            deepest = max(len(r.place.parts) for r in inside)
            return [r for r in inside if len(r.place.parts) == deepest]
        beside = [r for r in self.records if r.place.absolute().parent == path and r.state != GONE]
        return beside or self._copied(path)

    def _copied(self, path: Path) -> list[Known]:
        """What made the copy of a model, or of a file, at ``path``."""
        try:
            maker = self.maker(model_id(path, Contents(path / INDEX, cache=path)))
        except InputError:
            maker = self.maker(digest(path)) if path.is_file() else None
        return [maker] if maker else []

    def _by_id(self, start: str) -> list[Known]:
        if len(start) < LEAST or set(start) - set("0123456789abcdef"):
            return []
        own = [r for r in self.records if r.id.startswith(start)]
        made = [r for r in self.records if any(i.startswith(start) for i in r.ids.values())]
        return own or made or [
            r for r in self.records if any(i.startswith(start) for i in r.held())
        ]  # fmt: skip


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
            raise InputError(f"{root}: wanted a folder of runs, not found")
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
        if note and not any((root / name).is_file() for name in (STAGES, ALONE)):
            _note(root / INDEX, [m for m in here if not _same(indexed.get(m.id), m)])
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
        folder = next((p for p in places if any((p / n).is_file() for n in (STAGES, ALONE))), None)
        if folder is None or not path.exists() or scanned.intersection(places):
            continue
        scanned.add(folder)
        for made in _scan(folder.parent, folder, warnings):
            if (known := records.get(made.id)) is None or known.state != HERE:
                records[made.id] = made
            reads = made.made.reads.values()
            paths += [Path(read["path"]) for given in reads for read in given]


def note_run(out: Path) -> None:
    """Add the stages of one run to the index beside it, if there is one or the folder is runs/."""
    root = out.absolute().parent
    if root.name != "runs" and not (root / INDEX).is_file():
        return
    indexed = _read_index(root / INDEX, [])
    here = _scan(root, out.absolute(), [])
    _note(root / INDEX, [m for m in here if not _same(indexed.get(m.id), m)])


def _same(known: Known | None, made: Known) -> bool:
    if known is None or known.name != made.name:
        return False
    return _indexed(known.entry) == _indexed(made.entry)


def _indexed(entry: Entry) -> dict[str, Any]:
    """What an index has of a record: all but samples, which quote prompts of the data, and would
    be kept when the run is deleted and its data forgotten."""
    result = {k: v for k, v in (entry.result or {}).items() if k != SAMPLES}
    return table_of(replace(entry, result=None if entry.result is None else result))


def _scan(root: Path, folder: Path, warnings: list[str]) -> Iterator[Known]:
    """The records in and below ``folder``; their names begin at ``root``."""
    own = root.resolve().name
    for inner, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in INNER and not f.startswith("."))
        place = Path(inner)
        name = place.relative_to(root).as_posix()
        try:
            if STAGES in files:
                name = own if name == "." else name
                for stage, entry in _entries(place / STAGES):
                    if (place / stage).is_dir():
                        yield _made(f"{name}/{stage}", place / stage, entry)
            if ALONE in files:
                yield _made(own if name == "." else name, place, load_alone(place / ALONE))
        except InputError as error:
            warnings.append(str(error))


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """The finished stages of a run."""
    for name, entry in read_document(path, Record, extra="forbid").stages.items():
        if entry.outputs is not None:
            yield name, entry


def _made(name: str, place: Path, entry: Entry) -> Known:
    _check_made(entry, place)
    sizes = entry.outputs or {}
    whole = all(
        file.is_file() and file.stat().st_size == size
        for file, size in ((place / n, size) for n, size in sizes.items())
    )
    return Known(record_id(entry), name, place, entry, HERE if whole else CHANGED)


def _check_made(entry: Entry, where: object) -> None:
    if entry.made is None:
        raise InputError(f"{where}: made: expected how the stage made this, got nothing")


def record_id(entry: Entry) -> str:
    """The id of a record: of what was done and when, not of where it is."""
    made = entry.made
    assert made is not None
    first_ids = (made.earlier or [made.ids])[0]
    parts = [entry.kind, entry.options, entry.seconds, made.finished, made.reads, first_ids]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _read_index(path: Path, warnings: list[str]) -> dict[str, Known]:
    """The records that an index knows, as gone; of a record that moved, the last line."""
    found: dict[str, Known] = {}
    if not path.is_file():
        return found
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
    except OSError as error:
        warnings.append(f"{path}: cannot be read: {reason(error)}")
        return found
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line, IndexRow, f"{path}:{number}", extra="forbid")
            _check_made(row.entry, f"{path}:{number}")
        except InputError as error:
            if line.strip():
                warnings.append(f"{error}; left out")
            continue
        found[row.id] = Known(row.id, row.name, path.parent / row.name, row.entry, GONE)
    return found


def _note(path: Path, new: Iterable[Known]) -> None:
    """Append records to an index. A folder that cannot be written has none."""
    rows = [{"id": m.id, "name": m.name, "entry": _indexed(m.entry)} for m in new]
    append_lines(path, rows, required=False)
