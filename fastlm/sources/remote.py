"""Sources on object storage: ``s3://BUCKET/KEY``, a prefix, or a pattern with ``*``.

A remote file has a path such as ``s3:/bucket/key``, which is written and parsed as any other path.
fsspec reads it in blocks, with s3fs's limits on every wait (5 seconds to connect, 15 to read, 5
tries). A store that fails is no fault of a file: `StoreError` ends the work, a restart continues.

Rejected: copies in the cache (a crawl is larger than the disk).
"""

import io
from functools import cache
from pathlib import Path
from typing import Any

from fastlm.errors import InputError

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

    return fsspec.filesystem(SCHEME, default_block_size=BLOCK_BYTES, default_cache_type="readahead")


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
