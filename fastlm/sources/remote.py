"""Files on object storage: ``s3://BUCKET/KEY``, a prefix, or a pattern with ``*``.

A remote file has a path such as ``s3:/bucket/key``, which is written and parsed as any other path.
fsspec reads it in blocks. Every wait is limited: 5 seconds to connect, 15 for an answer, 3 tries of
botocore in each of 5 of s3fs. A write has a limit of its own: aiobotocore waits without one for the
store's "100 Continue". A store that fails is no fault of a file: `StoreError` ends the work, a
restart continues.

An object is written by one upload of bytes or of a finished local file, so it is complete or not
there. Rejected: files opened for writing (fsspec uploads what there is when the writer fails), and
copies of sources in the cache (a crawl is larger than the disk).
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import MAX_JSON_BYTES, read_text

SCHEME = "s3"
BLOCK_BYTES = 8 << 20  # one request; a smaller one costs more time to wait than to send


class StoreError(InputError):
    """The store failed, so the file says nothing: no document may be counted as unreadable."""


def is_remote(path: str | Path) -> bool:
    """Return True for the address or the path of a remote file."""
    return str(path).startswith(f"{SCHEME}:/")


def open_file(path: Path, *, buffering: int = -1) -> Any:
    """Open a local or remote file to read bytes. OSError: a local one that cannot be opened.
    StoreError: the store failed. InputError: s3fs is not installed.
    """
    if not is_remote(path):
        return open(path, "rb", buffering=buffering)
    raw = _RemoteFile(path)
    return raw if buffering == 0 else io.BufferedReader(raw, BLOCK_BYTES)


def list_remote(spec: str) -> list[tuple[str, Path]]:
    """Return (name relative to the prefix, path) of the objects of an address, sorted by name.

    Keys with empty or dotted parts are left out. StoreError: the store failed.
    """
    address = spec.removeprefix(f"{SCHEME}://").strip("/")
    store = _store(spec)
    with _StoreFaults(spec):
        store.invalidate_cache()
        if any(sign in address for sign in "*?["):
            keys = [key for key in store.glob(address) if store.isfile(key)]
            root = address[: min(address.find(sign) % (1 << 60) for sign in "*?[")]
            root = root.rpartition("/")[0]
        elif store.isfile(address):
            keys, root = [address], address.rpartition("/")[0]
        else:
            keys, root = store.find(address), address
    paths = [(key.removeprefix(root).lstrip("/"), Path(f"{SCHEME}:/{key}")) for key in keys]
    return sorted((name, path) for name, path in paths if str(path) == f"{SCHEME}:/{root}/{name}")


def is_file(path: Path) -> bool:
    """Return True for a local or remote file that exists."""
    if not is_remote(path):
        return path.is_file()
    store = _store(path)
    with _StoreFaults(path):
        store.invalidate_cache()
        return store.isfile(_key(path))


def file_size(path: Path) -> int:
    """Return the bytes of a local or remote file."""
    return remote_state(path)[0] if is_remote(path) else path.stat().st_size


def read_small(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the text of a local or remote file. InputError: missing, too large, not UTF-8."""
    if not is_remote(path):
        return read_text(path, max_bytes)
    data = read_object(path, max_bytes + 1)
    if data is None or len(data) > max_bytes:
        got = "none" if data is None else "more"
        raise InputError(f"{path}: expected an object of at most {max_bytes:,} bytes, got {got}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a readable text file, got: {error}") from None


def read_object(path: Path, max_bytes: int | None = None) -> bytes | None:
    """Return the bytes of a remote file, at most ``max_bytes``; None if it does not exist."""
    store = _store(path)
    with _StoreFaults(path):
        try:
            return store.cat_file(_key(path), start=None if max_bytes is None else 0, end=max_bytes)
        except FileNotFoundError:
            return None


def list_sizes(folder: Path) -> dict[str, int]:
    """Return the names of all remote files below ``folder``, relative to it, and their bytes."""
    store = _store(folder)
    with _StoreFaults(folder):
        store.invalidate_cache()
        prefix = f"{_key(folder)}/"
        entries = store.find(prefix, detail=True)
    return {key.removeprefix(prefix): entry["size"] for key, entry in sorted(entries.items())}


def write_object(path: Path, data: bytes) -> None:
    """Write a remote file at once."""
    store = _store(path)
    with _StoreFaults(path):
        store.pipe_file(_key(path), data, timeout=MAX_WAIT)


def upload(files: Sequence[tuple[Path, Path]]) -> None:
    """Upload finished local files: pairs (local, remote)."""
    size = sum(local.stat().st_size for local, _ in files)
    _transfer("put", [(str(local), _key(path)) for local, path in files], size)


def download(path: Path, local: Path) -> None:
    """Write the content of a remote file to ``local``."""
    store = _store(path)
    with _StoreFaults(path):
        store.get_file(_key(path), str(local))


def copy_objects(files: Sequence[tuple[Path, Path]]) -> None:
    """Copy remote files within the store: pairs (from, to)."""
    _transfer("copy", [(_key(source), _key(target)) for source, target in files])


def _transfer(method: str, files: Sequence[tuple[str, str]], size: int = 0) -> None:
    if files:
        name = f"{SCHEME}:/{files[0][1]}"
        store = _store(name)
        with _StoreFaults(name):
            sources, targets = map(list, zip(*files))
            timeout = MAX_WAIT * -(-len(files) // TRANSFERS) + size / MIN_SPEED
            getattr(store, method)(sources, targets, batch_size=TRANSFERS, timeout=timeout)


TRANSFERS = 16  # at once
MAX_WAIT = 120  # seconds, for a small write
MIN_SPEED = 1 << 20  # bytes a second


def delete_objects(paths: Sequence[Path]) -> None:
    """Delete remote files; those that do not exist are no error."""
    if not paths:
        return
    store = _store(paths[0])
    with _StoreFaults(paths[0]):
        store.rm([_key(path) for path in paths])


def delete_folder(folder: Path) -> None:
    """Delete all remote files below ``folder``."""
    delete_objects([folder / name for name in list_sizes(folder)])


def remote_state(path: Path) -> tuple[int, str]:
    """Return (size in bytes, the store's tag of the content) of a remote file."""
    with _StoreFaults(path):
        info = _store(path).info(_key(path))
    return info["size"], str(info.get("ETag", "")).strip('"')


def _key(path: Path) -> str:
    return str(path).removeprefix(f"{SCHEME}:/")


@cache
def _filesystem() -> Any:
    import fsspec

    retries = {"mode": "standard", "total_max_attempts": 3}
    return fsspec.filesystem(
        SCHEME, default_block_size=BLOCK_BYTES, default_cache_type="readahead",
        config_kwargs={"retries": retries},
    )  # fmt: skip


def _store(name: str | Path) -> Any:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        raise InputError(
            f"{name}: expected the package s3fs, which is not installed (pip install 'fastlm[s3]')"
        ) from None
    with _StoreFaults(name):
        return _filesystem()


class _StoreFaults:
    """A context in which every error becomes a StoreError with the name of the file."""

    def __init__(self, name: str | Path):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(f"{self._name}: expected an answer of the store: {reason}") from None


class _RemoteFile(io.RawIOBase):
    """The bytes of a remote file, read block by block."""

    def __init__(self, path: Path):
        self._path = path
        store = _store(path)
        with _StoreFaults(path):
            self._file = store.open(_key(path), "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _StoreFaults(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
