"""Open files that may be compressed.

Compression is detected by magic bytes rather than by name, so a mislabelled file is read correctly.
gzip and zstd are both decompressed as a stream of bounded pieces. A truncated file raises an error
instead of looking like a shorter file. ``zstandard``'s reader ends silently there, so the frames
are checked first. (Its ``decompressobj`` would report the truncation, but returns gigabytes for 256
KiB of a decompression bomb.)
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from fastlm.errors import InputError

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTD_LEVEL = 3  # level 6 takes twice the time and saves 5 %
READ_BYTES = 1 << 18  # read size for decompression; a larger one gains nothing measurable


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


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` and yield a stream of its decompressed bytes.

    InputError: the file cannot be opened, or its compression is truncated or corrupt.
    """
    try:
        raw = open(path, "rb")
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    with raw:
        try:
            magic = raw.peek(4)[:4]
            if magic.startswith(GZIP_MAGIC):
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
            elif magic == ZSTD_MAGIC:
                _check_zstd_is_complete(raw)
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                stream = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, reader), READ_BYTES))
            else:
                stream = raw
            yield stream
        except EOFError:
            raise InputError(
                f"{path}: expected complete compressed data, it is cut short"
            ) from None
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
            raise InputError(f"{path}: expected intact compressed data: {e}") from None
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None


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
