"""Detect by content whether input files have changed. Copying or touching a file is no change."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.progress import silent
from fastlm.schema import read_document
from fastlm.sources.reasoning_gym import is_reasoning_gym, package_version
from fastlm.sources.remote import is_remote, list_sizes, remote_state
from fastlm.sources.source_files import list_files, parse_source, printable

Stamp = tuple[int, int, int]  # size, mtime and ctime in ns
FileRecords = dict[str, tuple[int, int, int, str]]  # absolute path -> stamp and sha256
MAX_RECORD_BYTES = 1 << 30  # about 200 bytes per file


class InputDigest:
    """Hash the local files that a stage reads.

    A file is not read again if its size and times match those in the record of an earlier run. One
    of the times is the inode's, which ``touch -d`` cannot set back.
    """

    def __init__(self, record: Path, *, cache: Path, track=silent):
        """``record``: the JSON file of the previous run. All files are read if it is missing or
        damaged.
        """
        self.cache, self.track = cache, track
        self.folder = record.parent  # of the run
        self.current_records: FileRecords = {}
        self.changed = False  # since the record was written
        try:
            self.records = read_document(record, FileRecords, max_bytes=MAX_RECORD_BYTES)
        except InputError:
            self.records = {}

    def hash_sources(self, specs: Sequence[str], formats: Sequence[str] = ()) -> list[Any]:
        """Return [spec, entries] of each source. A local one has [name, size, sha256] of each file
        that is read from it (only files of ``formats``, if there are some). A reasoning-gym source
        has the version of its package.

        InputError: as in ``list_files``; the package of a reasoning-gym source is missing.
        """
        entries: dict[str, list[Any]] = {
            spec: [package_version()] for spec in specs if is_reasoning_gym(spec)
        }
        for spec in specs:
            if not parse_source(spec)[0]:
                files, _ = list_files(spec, cache=self.cache)
                files = [file for file in files if not formats or file.format in formats]
                if is_remote(spec):
                    states = ((file.name, *remote_state(file.path)) for file in files)
                    entries[spec] = [list(state) for state in states]
                    continue
                self._hash(file.path for file in files)
                entries[spec] = [self._entry(file.name, file.path) for file in files]
        return [[spec, entries.get(spec, [])] for spec in specs]

    def hash_tree(self, path: str | Path) -> list[Any]:
        """Return [name, size, sha256] of the file ``path``, or of each file below the folder. A
        remote one has the store's tag of the content instead of the hash.
        """
        path = Path(path)
        if is_remote(path):
            names = list(list_sizes(path))
            remote = [(name, path / name) for name in names] or [(path.name, path)]
            return [[name, *remote_state(file)] for name, file in remote]
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        try:
            self._hash(files)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        return [self._entry(str(p.relative_to(path)), p) for p in files]

    def hash_corpus(self, path: str | Path) -> list[Any]:
        """Return what identifies a corpus: its units.json, which has the hash of each part, or the
        files of an older one.
        """
        units = Path(path) / "units.json"
        if is_remote(path):
            return [*remote_state(units)]
        return self.hash_tree(units if units.is_file() else path)

    def _entry(self, name: str, path: Path) -> list[Any]:
        size, _, _, digest = self.current_records[printable(path.absolute())]
        return [name, size, digest]

    def _hash(self, paths: Iterable[Path]) -> None:
        paths_by_name = {printable(path.absolute()): path for path in paths}
        stamps = {name: _stamp(path) for name, path in paths_by_name.items()}
        changed = [
            name for name, stamp in stamps.items() if self.records.get(name, ())[:3] != stamp
        ]
        for name in self.track(changed, "checking sources", unit="files") if changed else ():
            self.records[name] = (*stamps[name], _digest(paths_by_name[name]))
        self.changed |= bool(changed)
        self.current_records |= {name: self.records[name] for name in stamps}


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # the data stage counts the file or refuses it
        return f"unreadable: {error.strerror}"
