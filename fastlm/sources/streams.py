"""Open files that may be compressed.

Compression is detected by magic bytes rather than by name, so a mislabelled file is read correctly.
gzip and zstd are both decompressed as a stream of bounded pieces. A truncated file raises an error
instead of looking like a shorter file. ``zstandard``'s reader ends silently there, so the frames
are checked first. (Its ``decompressobj`` would report the truncation, but returns gigabytes for 256
KiB of a decompression bomb.)
"""

import bisect
import gzip
import hashlib
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import zstandard

from fastlm.errors import InputError
from fastlm.sources.remote import open_file

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTD_LEVEL = 3  # level 6 takes twice the time and saves 5 %
GZIP_READ_BYTES = 1 << 16  # the rest of a block is copied once for each member
READ_BYTES = 1 << 18  # read size for decompression; a larger one gains nothing measurable
COMPRESSION_ERRORS = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def _check_zstd_is_complete(raw: BinaryIO) -> None:
    """Raise EOFError if the last frame is cut short. Seeks from block to block, about 128 KiB of
    text each.

    A frame is a header, blocks and, optionally, a checksum. A block starts with 3 bytes: bit 0
    marks the last block, bits 1-2 are the type, the rest is the size.
    """
    end = raw.seek(0, os.SEEK_END)
    position = 0
    while position < end:
        raw.seek(position)
        head = raw.read(18)  # the longest frame header
        if len(head) < 8:
            raise EOFError
        if head[1:4] == ZSTD_MAGIC[1:] and head[0] == ZSTD_MAGIC[0]:
            position += zstandard.frame_header_size(head)
            checksum = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
            last = False
            while not last:
                raw.seek(position)
                if len(header := raw.read(3)) < 3:
                    raise EOFError
                block = int.from_bytes(header, "little")
                last, run_length = bool(block & 1), (block >> 1) & 3 == 1
                position += 3 + (1 if run_length else block >> 3)
            position += checksum
        elif head[1:4] == b"\x2a\x4d\x18":  # skippable frame: its size follows
            position += 8 + int.from_bytes(head[4:8], "little")
        else:
            raise zstandard.ZstdError("not a zstd frame")
    if position > end:
        raise EOFError
    raw.seek(0)


class StreamError(InputError):
    """The compressed data of a file is cut short or corrupt: what was read before may be used."""


class _CutStream(io.RawIOBase):
    """The bytes before the end of a zstd file that is cut short, then EOFError, as gzip does."""

    def __init__(self, reader: Any):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if n := self._reader.readinto(buffer):
            return n
        raise EOFError


@contextmanager
def name_faults(path: Path) -> Iterator[None]:
    """Raise InputError with the path for what fails while ``path`` is read or decompressed."""
    try:
        yield
    except EOFError:
        raise StreamError(f"{path}: expected complete compressed data, it is cut short") from None
    except COMPRESSION_ERRORS as e:
        raise StreamError(f"{path}: expected intact compressed data: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None


def decompressed(raw: Any, *, partial: bool = False) -> BinaryIO:
    """Return the stream of the decompressed bytes of ``raw``, from its start.

    ``partial``: zstd data that is cut short is read up to the cut.
    """
    magic = raw.peek(4)[:4]
    if magic.startswith(GZIP_MAGIC):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if magic != ZSTD_MAGIC:
        return raw
    cut = False
    try:
        _check_zstd_is_complete(raw)
    except (EOFError, zstandard.ZstdError):
        if not partial:
            raise
        cut = True
        raw.seek(0)
    reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
    stream = _CutStream(reader) if cut else cast(io.RawIOBase, reader)
    return cast(BinaryIO, io.BufferedReader(stream, READ_BYTES))


@contextmanager
def open_stream(path: Path, *, offset: int = 0, partial: bool = False) -> Iterator[BinaryIO]:
    """Open ``path`` and yield a stream of its decompressed bytes.

    ``offset``: where to start in a file that is not compressed. ``partial``: read what there is
    before a cut (zstd; gzip always does). InputError: the file cannot be opened, or its compression
    is truncated or corrupt (`StreamError`).
    """
    with name_faults(path):
        with open_file(path) as raw:
            if offset:
                raw.seek(offset)
                yield raw
            else:
                yield decompressed(raw, partial=partial)


class HashedFile(io.RawIOBase):
    """A file that is hashed while it is read, also by readers that jump back."""

    def __init__(self, path: Path):
        self._file = open_file(path, buffering=0)
        self._sha256, self._hashed = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        n = self._file.readinto(buffer) or 0
        if start <= self._hashed < start + n:
            self._sha256.update(memoryview(buffer)[self._hashed - start : n])
            self._hashed = start + n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()

    def digest(self) -> tuple[str, int]:
        """Read the rest; return the hexadecimal SHA-256 and the size in bytes."""
        self._file.seek(self._hashed)
        block = bytearray(READ_BYTES)
        while self.readinto(block):
            pass
        return self._sha256.hexdigest(), self._hashed


class GzipMembers:
    """Decompress gzip data and remember where its members start.

    ``gzip.GzipFile`` does not say where a member starts, and a WARC has one for each record.
    """

    def __init__(self, raw: BinaryIO, offset: int = 0):
        raw.seek(offset)
        self._raw, self._input, self._input_end = raw, b"", offset
        self._inflate = zlib.decompressobj(31)
        self._begun = False  # a byte of the current member was read
        self._position = 0
        self._starts: list[tuple[int, int]] = [(0, offset)]  # (decompressed, compressed) positions

    def tell(self) -> int:
        """Return the number of decompressed bytes that were read."""
        return self._position

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, b"" at the end. EOFError: the last member is cut short."""
        while True:
            if self._inflate.eof:
                self._input = self._inflate.unused_data.lstrip(b"\0")
                self._inflate, self._begun = zlib.decompressobj(31), False
            if not self._input:
                self._input = self._raw.read(GZIP_READ_BYTES)
                self._input_end += len(self._input)
                if not self._begun:
                    self._input = self._input.lstrip(b"\0")  # zeros may pad the end
                if not self._input:
                    if self._begun:
                        raise EOFError
                    return b""
            if not self._begun:
                start = self._input_end - len(self._input)
                if self._starts[-1][0] == self._position:
                    self._starts.pop()
                self._starts.append((self._position, start))
                self._begun = True
            data = self._inflate.decompress(self._input, size)
            self._input = self._inflate.unconsumed_tail
            self._position += len(data)
            if data:
                return data

    def locate(self, position: int) -> tuple[int, int]:
        """Return (start of the member in the file, bytes to skip in it) of a decompressed position.

        Positions before the last call's are forgotten.
        """
        index = bisect.bisect_right(self._starts, (position, sys.maxsize)) - 1
        del self._starts[:index]
        decompressed, compressed = self._starts[0]
        return compressed, position - decompressed


@contextmanager
def compressed(file: IO[bytes], magic: bytes) -> Iterator[IO[bytes]]:
    """Open a stream that writes to ``file`` in the compression that begins with ``magic``."""
    if magic.startswith(GZIP_MAGIC):
        with gzip.GzipFile(fileobj=file, mode="wb") as out:
            yield cast(IO[bytes], out)
    elif magic == ZSTD_MAGIC:
        compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, write_checksum=True)
        with compressor.stream_writer(file, closefd=False) as out:
            yield cast(IO[bytes], out)
    else:
        yield file
