"""Atomic writes: to a name next to the final one, synced, then renamed. Reads of small files from
untrusted sources.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from fastlm.errors import InputError

PATIENCE = 1.0  # seconds to wait for a lock
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what stands for bytes in a name, PEP 383
MAX_JSON_BYTES = 2**26  # the index of a 400-billion-parameter model is 0.3 MB


def open_regular(path: str | Path) -> BufferedReader:
    """Open ``path`` for reading. OSError: not readable, or not a regular file (a pipe would block
    for ever).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:  # NUL, or a lone surrogate
        raise OSError(0, "no name of a file", str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "a folder or a device, no file", str(path))
    return open(fd, "rb")


def read_text(path: str | Path, most: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text in ``path``, at most ``most`` bytes. InputError: anything else."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise InputError(f"{path}: expected at most {most:,} bytes, got more")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a readable text file, got: {reason(error)}") from error


def parse_json(text: str, where: object) -> Any:
    """The value of the JSON ``text``. InputError: not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected readable JSON, got: {reason(error)}") from error


def read_json(path: str | Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``. InputError: unreadable, too large, or not an object."""
    value = parse_json(read_text(path, most), path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """Context: a temporary name next to ``path``. The file or folder that the block creates there
    is synced and renamed to ``path``. If anything fails, nothing new is left and ``path`` is
    unchanged.

    The temporary name is new each time, so two processes that write the same file at once both
    write complete files. A folder needs two renames: the old one away, then the new one into place.
    A crash between them leaves the old folder, complete, next to ``path`` as
    ``.NAME.fastlm-*.old``; the next write of ``path`` puts it back, and removes what else killed
    ones have left of ``path``. A full disk, a read-only folder and the like raise InputError.
    """
    path = Path(path)
    with scratch(path) as part:
        yield part
        for item in [*part.rglob("*"), part] if part.is_dir() else [part]:
            sync(item)
        if part.is_dir():
            _swap(part, path)
        else:
            os.replace(part, path)
        sync(path.parent)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Context: a temporary name next to ``path`` for a file or folder, removed at the end. What
    killed processes have left under such names is removed first. InputError: not writable.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path}: expected a path that ends in a name")
    part = new_name(path)
    try:
        with _working(path):
            yield part
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        remove(part)


def save_atomic(path: str | Path, writer: Callable[[Path], Any]) -> None:
    """Write ``path`` by `beside`: ``writer(part)`` creates a file or a folder at ``part``."""
    with beside(path) as part:
        writer(part)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by `beside`. Creates its folder."""
    make_folder(path.parent)
    save_atomic(path, lambda part: part.write_text(text, "utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people can read to ``path``, as `write_text`. A byte of a name that is no
    UTF-8 becomes \\xNN.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    write_text(path, NOT_UTF8.sub(lambda m: rf"\\x{ord(m[0]) - 0xDC00:02x}", text) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Context: a file for the new content of ``path`` (see `beside`). Creates its folder."""
    make_folder(path.parent)
    with beside(path) as part, open(part, "wb") as file:
        yield file


def make_folder(path: str | Path) -> Path:
    """Create the folder ``path`` unless it exists, and return it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder: {reason(error)}") from error
    return path


def write_error(path: Path, error: Exception) -> InputError:
    """The one-line InputError for a write that the system refused."""
    return InputError(f"{path}: cannot be written: {reason(error)}")


def reason(error: BaseException) -> str:
    """The system's error message, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def new_name(path: Path, end: str = "part") -> Path:
    """A name next to ``path`` that nobody else has, for what is being written or deleted."""
    return path.with_name(f".{path.name}.fastlm-{secrets.token_hex(8)}.{end}")


def leftovers(path: Path) -> list[Path]:
    """What exists next to ``path`` under a name of `new_name`: of a process at work, or killed."""
    name = re.compile(rf"\.{re.escape(path.name)}\.fastlm-[0-9a-f]{{16}}\.(part|old)")
    return sorted(left for left in path.parent.iterdir() if name.fullmatch(left.name))


def clean_up(path: Path) -> None:
    """Put back the old folder of a swap of ``path`` that was cut off, and remove what was not
    finished, unless somebody works in the folder of ``path``, which must exist.
    """
    with _opened(path.parent) as folder, contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clean_up(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)  # and ends the lock


@contextlib.contextmanager
def _working(path: Path) -> Iterator[None]:
    """Context: a shared lock on the folder of ``path``, which ends with the process. A writer that
    is alone there cleans up after those that were killed.
    """
    with _opened(path.parent) as folder:
        with contextlib.suppress(OSError):  # others write here, or a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clean_up(path)
        _share(folder)
        yield


def _share(folder: int) -> None:
    """Take the shared lock. Another writer's `clean_up` is waited for; a program that holds on to
    the folder is not: then the write has no lock.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return None
            time.sleep(0.02)
        except OSError:
            return None


def _clean_up(path: Path) -> None:
    for left in leftovers(path):
        if left.suffix == ".old" and not path.exists():
            os.rename(left, path)
        else:
            remove(left)


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    with _opened(path) as fd:
        os.fsync(fd)


def remove(path: Path) -> None:
    """Delete a file or a folder; what cannot be deleted stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _swap(part: Path, path: Path) -> None:
    if not path.exists():
        os.rename(part, path)
        return
    if not path.is_dir():
        raise NotADirectoryError(20, "a file of that name exists", str(path))
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):  # a process inside would stay in the old folder
        raise InputError(f"{path}: expected a folder that is not the working directory")
    old = new_name(path, "old")
    os.rename(path, old)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(old, path)
        raise
    os.rename(old, part)  # not to be put back: it may be deleted by half


def append_lines(path: Path, rows: Sequence[Any], *, required: bool = True) -> None:
    """Append JSON lines to a file, on disk when this returns; other processes wait. A line that was
    cut off there is ended first. InputError: not writable, unless not ``required``.
    """
    if not rows:
        return
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    try:
        with open(path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if required:
            raise InputError(f"{path}: cannot be written: {reason(error)}") from error
