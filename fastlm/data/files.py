"""Opening what may be compressed and writing what must never be half there.

Compression is told by magic bytes rather than by the name, so a mislabelled file is read as what it is. Zstandard and
gzip are decompressed as a stream: a truncated file raises instead of looking like a shorter one (``zstandard``'s own
reader ends quietly there, hence the frame check).
"""

import errno
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from fastlm.errors import InputError

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
READ_BYTES = 1 << 18  # the decompressors' unit of work; larger gains nothing measurable


class _ZstdReader(io.RawIOBase):
    """Zstandard frames, one after the other, to bytes; EOFError where the last frame is cut short."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._input, self._frame = raw, b"", None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._raw.read(READ_BYTES)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("zstd frame ended before its end marker")
                    return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(frame.decompress(self._input))
            self._input = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of ``path``. InputError: cannot be opened, or truncated or corrupt compression."""
    try:
        raw = open(path, "rb")
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    with raw:
        magic = raw.peek(4)[:4]
        if magic.startswith(GZIP_MAGIC):
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif magic == ZSTD_MAGIC:
            stream = cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), READ_BYTES))
        else:
            stream = raw
        try:
            yield stream
        except EOFError:
            raise InputError(f"{path}: wanted whole compressed data, it is cut short") from None
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
            raise InputError(f"{path}: wanted intact compressed data: {e}") from None
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None


def write_error(path: Path, e: OSError) -> InputError:
    """The one line for a write that the system refused."""
    if e.errno == errno.ENOSPC:
        return InputError(f"{path}: cannot be written: the disk is full")
    return InputError(f"{path}: cannot be written: {e.strerror or e}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write ``path`` under a name beside it; flushed to disk and renamed only when the block ends well.

    InputError: read-only folder, full disk. The partial file is removed on any failure, and overwritten after a kill.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise write_error(path, e) from None
        raise
