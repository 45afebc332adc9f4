"""Write files atomically: to a temporary name, synced, then renamed. Read small untrusted files."""

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

from fastlm.errors import InputError, StorageError

PATIENCE = 1.0  # seconds to wait for a lock
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # code points for invalid bytes in a name, PEP 383
MAX_JSON_BYTES = 2**26  # the index of a 400-billion-parameter model is 0.3 MB


def open_regular(path: str | Path) -> BufferedReader:
    """Open ``path`` for reading. OSError: unreadable or not a regular file (a pipe would block)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:  # NUL, or a lone surrogate
        raise OSError(0, "not a file name", str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "a folder or a device, not a file", str(path))
    return open(fd, "rb")


def read_text(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the UTF-8 text in ``path``, at most ``max_bytes`` bytes. InputError: anything else."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size  # read() allocates what it is asked for
            data = file.read(min(size, max_bytes) + 1)
        if len(data) > max_bytes:
            raise InputError(f"{path}: expected at most {max_bytes:,} bytes, got more")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a readable text file, got: {reason(error)}") from error


def parse_json(text: str, source: object) -> Any:
    """Return the value of the JSON ``text``. InputError: not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: expected readable JSON, got: {reason(error)}") from error


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in ``path``. InputError: unreadable, too large, or not an object."""
    value = parse_json(read_text(path, max_bytes), path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Context: yield a temporary name next to ``path``. The file or folder that the block creates
    there is synced and renamed to ``path``. If anything fails, nothing new is left and ``path`` is
    unchanged.

    Every call has a new temporary name, so two processes that write the same file at once both
    write complete files. A folder needs two renames: the old one away, then the new one into place.
    A crash between them leaves the complete old folder next to ``path`` as ``.NAME.fastlm-*.old``.
    The next write of ``path`` restores it, and removes the temporary files of killed processes. A
    full disk, a read-only folder and the like raise InputError.
    """
    path = Path(path)
    with temporary_path(path) as part:
        yield part
        for item in [*part.rglob("*"), part] if part.is_dir() else [part]:
            sync(item)
        if part.is_dir():
            _swap(part, path)
        else:
            os.replace(part, path)
        sync(path.parent)


@contextlib.contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Context: yield a temporary name next to ``path`` for a file or folder, which is removed at
    the end. Temporary files of killed processes are removed first. InputError: not writable.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path}: expected a path that ends in a name")
    part = temporary_name(path)
    try:
        with _folder_lock(path):
            yield part
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        remove(part)


def save_atomic(path: str | Path, writer: Callable[[Path], Any]) -> None:
    """Write ``path`` by `atomic_path`: ``writer(part)`` creates a file or a folder at ``part``."""
    with atomic_path(path) as part:
        writer(part)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by `atomic_path`. Creates its folder."""
    make_folder(path.parent)
    save_atomic(path, lambda part: part.write_text(text, "utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people can read to ``path``, as `write_text`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return JSON that people can read. A byte of a name that is not UTF-8 becomes \\xNN."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    return NOT_UTF8.sub(lambda m: rf"\\x{ord(m[0]) - 0xDC00:02x}", text) + "\n"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Context: yield a file for the new content of ``path`` (see `atomic_path`). Creates its
    folder.
    """
    make_folder(path.parent)
    with atomic_path(path) as part, open(part, "wb") as file:
        yield file


def make_folder(path: str | Path) -> Path:
    """Create the folder ``path`` unless it exists, and return it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot create the folder: {reason(error)}") from error
    return path


def write_error(path: Path, error: Exception) -> StorageError:
    """Return the one-line error for a write that the system refused."""
    return StorageError(f"{path}: cannot be written: {reason(error)}")


def reason(error: BaseException) -> str:
    """Return the system's error message, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def temporary_name(path: Path, end: str = "part") -> Path:
    """Return a unique name next to ``path``, for a file that is being written or deleted."""
    return path.with_name(f".{path.name}.fastlm-{secrets.token_hex(8)}.{end}")


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files next to ``path``, of running or killed processes."""
    name = re.compile(rf"\.{re.escape(path.name)}\.fastlm-[0-9a-f]{{16}}\.(part|old)")
    return sorted(left for left in path.parent.iterdir() if name.fullmatch(left.name))


def try_lock(file: IO[Any], in_use: str) -> None:
    """Lock an open file until it is closed or the process ends. Without effect on a file system
    without locks. InputError(in_use): another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(in_use) from None
    except OSError:
        pass


def clean_up(path: Path) -> None:
    """Restore the old folder of an interrupted swap of ``path`` and remove unfinished files, unless
    a process works in the folder of ``path``, which must exist.
    """
    with _open_folder(path.parent) as folder, contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clean_up(path)


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)  # and ends the lock


@contextlib.contextmanager
def _folder_lock(path: Path) -> Iterator[None]:
    """Context: hold a shared lock on the folder of ``path``, which ends with the process. The only
    writer in a folder removes the files of killed writers.
    """
    with _open_folder(path.parent) as folder:
        with contextlib.suppress(OSError):  # another writer, or no locks here
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clean_up(path)
        _share(folder)
        yield


def _share(folder: int) -> None:
    """Take the shared lock. Wait for the `clean_up` of another writer, but not for a program that
    keeps the folder locked: then write without a lock.
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
    for item in leftovers(path):
        if item.suffix == ".old" and not path.exists():
            os.rename(item, path)
        else:
            remove(item)


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    with _open_folder(path) as fd:
        os.fsync(fd)


def remove(path: Path) -> None:
    """Delete a file or a folder, as far as possible."""
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
    cwd = Path.cwd()
    if path.resolve() in (cwd, *cwd.parents):  # this process would stay in the old folder
        raise InputError(f"{path}: expected a folder that is not the working directory")
    old = temporary_name(path, "old")
    os.rename(path, old)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(old, path)
        raise
    os.rename(old, part)  # so that it is not restored half deleted


def append_lines(path: Path, rows: Sequence[Any], *, required: bool = True) -> None:
    """Append JSON lines to a file and sync it, under a lock. A truncated last line is ended first.
    InputError: not writable, if ``required``.
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
