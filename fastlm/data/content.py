"""Whether local sources hold what they held: by content, so that a copied or touched file is no
change.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.data.sources import list_files, parse_source
from fastlm.progress import silent

Seen = dict[str, list[Any]]  # absolute path -> size, two times in ns, sha256


def source_states(sources: Sequence[str], seen: Seen, *, cache: Path, track=silent) -> list[Any]:
    """Per source its spec and, of a local one, [name, size, sha256] of each file read from it.

    ``seen`` is what was hashed before and is brought up to date: a file whose size and times are
    those of ``seen`` is not read again. The time of the inode is one of them, which no ``touch -d``
    sets back. InputError as ``list_files``.
    """
    local = {
        spec: list_files(spec, cache=cache)[0] for spec in sources if not parse_source(spec)[0]
    }
    stamps = {
        str(file.path.absolute()): _stamp(file.path) for files in local.values() for file in files
    }
    changed = [p for p, stamp in stamps.items() if seen.get(p, [])[:3] != stamp]
    for path in track(changed, "checking sources", unit="files") if changed else ():
        seen[path] = [*stamps[path], _digest(Path(path))]
    for path in seen.keys() - stamps.keys():
        del seen[path]
    states: list[Any] = []
    for spec in sources:
        entries = [(f.name, seen[str(f.path.absolute())]) for f in local.get(spec, [])]
        states.append([spec, [[name, size, digest] for name, (size, _, _, digest) in entries]])
    return states


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # the data stage counts it, or refuses it
        return f"unreadable: {error.strerror}"
