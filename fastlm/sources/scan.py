"""Scan a source file: its hash, its policy files, and the ranges that can be read apart.

One streaming read hashes the file and finds the ranges. A small file has one range and is only
hashed, unless it is a WARC, whose policy files (robots.txt and its like) decide about pages of
other files too.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastlm.errors import InputError
from fastlm.sources.document import WHOLE_FILE, FileRange, SourceFile
from fastlm.sources.parquet import row_group_starts
from fastlm.sources.plain_text import UTF16_MARKS, text_pieces
from fastlm.sources.remote import StoreError
from fastlm.sources.streams import (
    COMPRESSION_ERRORS,
    GZIP_MAGIC,
    READ_BYTES,
    ZSTD_MAGIC,
    HashedFile,
    decompressed,
    name_faults,
)
from fastlm.sources.warc import PolicyFile, read_policies

# A range of a compressed file is decompressed from the beginning: reading all ranges costs half as
# many times the decompression.
MAX_SKIPPING_RANGES = 32
COMPRESSION = 4  # text is about four times its compressed size


@dataclass(frozen=True, slots=True)
class FileScan:
    """What is known of a file before its documents are read. ``size``: bytes of the file as stored.

    ``text_size``: of its content, estimated as `COMPRESSION` times that of a compressed file.
    ``skipped`` counts policy files that were cut or left out. Other faults are counted by the
    reader of the range that has them.
    """

    sha256: str
    size: int
    text_size: int
    ranges: tuple[FileRange, ...]
    policies: tuple[PolicyFile, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)


def scan_file(file: SourceFile, *, unit_bytes: int) -> FileScan:
    """Hash a file and cut it into ranges of about ``unit_bytes`` of decompressed text.

    Ranges begin at lines (JSON lines), records (WARC), row groups (Parquet) or pieces (long text).
    Faults of the content are left to the readers of the ranges. InputError: the file cannot be
    read, or ``unit_bytes`` is not positive.
    """
    if unit_bytes < 1:
        raise InputError(f"unit_bytes: expected 1 or more, got {unit_bytes}")
    ranges: tuple[FileRange, ...] = (WHOLE_FILE,)
    policies: list[PolicyFile] = []
    skipped: Counter[str] = Counter()
    with name_faults(file.path), HashedFile(file.path) as hashed:
        raw: Any = io.BufferedReader(hashed, READ_BYTES)
        size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        is_gzip_or_zstd = raw.peek(4)[:4].startswith((GZIP_MAGIC, ZSTD_MAGIC))
        is_compressed = is_gzip_or_zstd or file.format == "parquet"
        text_size = size * (COMPRESSION if is_compressed else 1)
        is_small = text_size < unit_bytes
        if file.format == "warc":
            ranges = _ranges(_record_cuts(file, raw, unit_bytes, policies, skipped))
        elif file.format == "parquet" and not is_small:
            rows = row_group_starts(file, raw, unit_bytes)
            ranges = _ranges((row, SEEKABLE) for row in rows)
        elif file.format in CUTS and not is_small:
            stream = decompressed(raw, partial=True)
            ranges = _ranges(CUTS[file.format](file, stream, unit_bytes, is_compressed))
        sha256, size = hashed.digest()
    return FileScan(sha256, size, text_size, ranges, tuple(policies), dict(skipped))


Cut = tuple[int, int]  # (item, its byte in the file, 0 or SEEKABLE)
SEEKABLE = -1  # the reader finds the item without an offset


def _ranges(cuts: Iterator[Cut]) -> tuple[FileRange, ...]:
    """Return the ranges between cuts; a fault of the content ends the last one."""
    starts: list[Cut] = [(0, 0)]
    try:
        for cut in cuts:
            starts.append(cut)
    except StoreError:
        raise
    except (InputError, EOFError, *COMPRESSION_ERRORS):
        pass  # the reader of the last range names it
    if any(not offset for _, offset in starts[1:]):
        step = -(-len(starts) // MAX_SKIPPING_RANGES)
        starts = [(item, 0) for item, _ in starts[::step]]
    stops = [item for item, _ in starts[1:]]
    return tuple(
        FileRange(item, stop, max(offset, 0))
        for (item, offset), stop in zip(starts, [*stops, None])
    )


def _record_cuts(
    file: SourceFile, raw: Any, unit_bytes: int, policies: list[PolicyFile],
    skipped: Counter[str],
) -> Iterator[Cut]:  # fmt: skip
    total = 0
    for item, size in read_policies(file, raw, skipped):
        if item.value is not None:
            policies.append(item.value)
        if total >= unit_bytes:
            offset, skip = item.position
            yield item.index, 0 if skip else offset
            total = 0
        total += size


def _line_cuts(
    file: SourceFile, stream: BinaryIO, unit_bytes: int, is_compressed: bool
) -> Iterator[Cut]:
    lines = position = 0
    next_cut = unit_bytes
    cut: Cut | None = None
    while block := stream.read(READ_BYTES):
        if cut:
            yield cut  # it is not the end of the file
            cut = None
        counted = 0
        while position + len(block) >= next_cut:
            end = block.find(b"\n", max(next_cut - position - 1, counted)) + 1
            if not end:
                break
            if cut:
                yield cut
            lines += block.count(b"\n", counted, end)
            counted = end
            cut = lines, 0 if is_compressed else position + end
            next_cut = position + end + unit_bytes
        if cut and counted < len(block):
            yield cut
            cut = None
        lines += block.count(b"\n", counted)
        position += len(block)


def _piece_cuts(
    file: SourceFile, stream: BinaryIO, unit_bytes: int, is_compressed: bool
) -> Iterator[Cut]:
    if stream.peek(2)[:2] in UTF16_MARKS:  # type: ignore[attr-defined]
        return
    pieces = next_cut = 0
    next_cut = unit_bytes
    for piece in text_pieces(file, stream):
        if piece.offset >= next_cut:
            yield pieces, 0 if is_compressed else piece.offset
            next_cut = piece.offset + unit_bytes
        pieces += bool(piece.data.strip())


CUTS = {"jsonl": _line_cuts, "text": _piece_cuts}
