"""Whether local sources hold what they held: by content, so that a copied or touched file is no
change.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data.sources import list_files, parse_source, printable
from fastlm.errors import InputError
from fastlm.files import read_json
from fastlm.progress import silent
from fastlm.typed import build

Stamp = tuple[int, int, int]  # size, and two times in ns
Seen = dict[str, tuple[int, int, int, str]]  # absolute path -> the stamp and sha256
MAX_SEEN_BYTES = 1 << 30  # some 200 bytes a file


def load_seen(path: Path) -> Seen:
    """What was hashed before; nothing where ``path`` is missing or damaged: it is hashed again."""
    try:
        return build(_Record, {"seen": read_json(path, MAX_SEEN_BYTES)}).seen
    except InputError:
        return {}


@dataclass
class _Record:
    seen: Seen


def source_states(sources: Sequence[str], seen: Seen, *, cache: Path, track=silent) -> list[Any]:
    """Per source its spec and, of a local one, [name, size, sha256] of each file read from it.

    ``seen`` is what was hashed before and is brought up to date: a file whose size and times are
    those of ``seen`` is not read again. The time of the inode is one of them, which no ``touch -d``
    sets back. InputError as ``list_files``.
    """
    local = {
        spec: list_files(spec, cache=cache)[0] for spec in sources if not parse_source(spec)[0]
    }
    paths = {printable(f.path.absolute()): f.path for files in local.values() for f in files}
    stamps = {name: _stamp(path) for name, path in paths.items()}
    changed = [name for name, stamp in stamps.items() if seen.get(name, ())[:3] != stamp]
    for name in track(changed, "checking sources", unit="files") if changed else ():
        seen[name] = (*stamps[name], _digest(paths[name]))
    for name in seen.keys() - stamps.keys():
        del seen[name]
    states: list[Any] = []
    for spec in sources:
        entries = [(f.name, seen[printable(f.path.absolute())]) for f in local.get(spec, [])]
        states.append([spec, [[name, size, digest] for name, (size, _, _, digest) in entries]])
    return states


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # the data stage counts it, or refuses it
        return f"unreadable: {error.strerror}"
