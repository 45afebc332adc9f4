"""The local copies, on one node, of the files of a build on object storage.

All workers of a node share the folder: one downloads a file, the others map it. Its size is
bounded: the files that were used longest ago are deleted first. It is in the folder of temporary
files (``TMPDIR``) and is deleted at the end of the build, at the latest by a later build.
"""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fastlm.files import make_folder, remove
from fastlm.sources.remote import download, file_size

MAX_SHARE = 0.5  # of the space that is free or used by the copies
MIN_AGE = 60  # seconds since the last use: a worker may be about to open the file
MAX_DAYS = 2  # that a killed build leaves its copies


def cache_folder(session: str) -> Path:
    """Return the folder of a build on this node. Created; those of killed builds are deleted."""
    root = _root()
    folder = root / session
    if not folder.is_dir():
        make_folder(folder)
        root.chmod(0o700)
        for other in root.iterdir():
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > MAX_DAYS * 86400:
                    remove(other)
    return folder


def remove_caches(session: str) -> None:
    """Delete the folders of a build, and of builds within it, on this node."""
    for folder in _root().glob(f"{session}*"):
        remove(folder)


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"fastlm-{os.getuid()}"


def fetch(path: Path, copy: Path, root: Path) -> None:
    """Make ``copy``, below the cache folder ``root``, a local copy of a remote file."""
    with suppress(FileNotFoundError):
        os.utime(copy)
        return
    _make_room(root, file_size(path))
    make_folder(copy.parent)
    part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
    try:
        download(path, part)
        os.replace(part, copy)
    finally:
        remove(part)


def _make_room(root: Path, size: int) -> None:
    """Delete the copies that were used longest ago until ``size`` bytes more are in the bound."""
    files = []
    for path in root.rglob("*"):
        with suppress(OSError):
            # what units are writing (`.NNNNN.PID.part/`) is not uploaded yet
            if path.is_file() and ".part" not in (path.suffix, path.parent.suffix):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
    used = sum(entry[1] for entry in files)
    limit = MAX_SHARE * (shutil.disk_usage(root).free + used)
    for used_at, file_bytes, path in sorted(files):
        if used + size <= limit or time.time() - used_at < MIN_AGE:
            break
        remove(path)
        used -= file_bytes
