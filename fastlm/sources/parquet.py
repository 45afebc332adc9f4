"""Read Parquet files: a column of text, a row a document, one row group after the other.

A row group is read in batches, so memory grows with its largest page, not with the group: pyarrow
writes up to 1,024 rows as a page and decodes a page whole. A group whose rows are too long for that
by the sizes that the file states, or that is packed as no text is, is not read (`_check_size`); a
file that lies about its sizes is not found out. Texts are read as entries of their dictionary: a
page that names one long text a thousand times has it once. A group that cannot be decoded is
counted, and the next one is read. Its pages are checked against their checksums where a file has
them.

Rejected: reading a group in one call (a writer's default group has a million rows).
"""

import builtins
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime
from math import isfinite
from typing import Any

from fastlm.errors import InputError
from fastlm.sources.document import (
    BROKEN_GROUP,
    MAX_DOCUMENT_BYTES,
    MAX_REPORTED_ROWS,
    WHOLE_FILE,
    Document,
    FileRange,
    SourceFile,
    ignore_message,
)
from fastlm.sources.json_rows import Row, parse_rows
from fastlm.sources.remote import StoreError, open_file

META_COLUMNS = ("url", "id", "date", "language")
MAX_META_CHARACTERS = 8 << 10
BATCH_BYTES, MAX_BATCH_ROWS = 4 << 20, 1024  # of one batch, by the average size of a row
# of one row group: the rows before a slice are decoded and dropped
MAX_GROUP_SLICES = 8
PAGE_ROWS = 1024  # that pyarrow writes as one page
MAX_PAGE_BYTES = 1 << 30  # of such a page, by the average size of a row
# A group of this size may be so many times as large as its packed bytes: zstd packs text to a fifth
MAX_PACKED_BYTES, MAX_RATIO = 256 << 20, 100


def read_parquet(
    file: SourceFile,
    range: FileRange = WHOLE_FILE,
    *,
    field: str = "text",
    skipped: Counter[str],
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Document]:
    """Yield a document for each row of ``range`` with a text in the column ``field``.

    ``meta`` has the values of META_COLUMNS. Rows without a text, or with one over
    MAX_DOCUMENT_BYTES, and row groups that cannot be decoded are counted in ``skipped``.
    InputError: no Parquet file, no such column, a whole file without a good row.
    """
    with open_file(file.path) as raw:
        table = _open(file, raw)
        columns = _columns(file, table, field)
        table = _open(file, raw, columns)
        faults: list[str] = []
        stop = range.stop if range.stop is not None else table.metadata.num_rows

        def rows() -> Iterator[Row]:
            first = 0
            for group in builtins.range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if first < stop and first + size > range.start:
                    yield from group_rows(group, first)
                first += size

        def group_rows(group: int, first: int) -> Iterator[Row]:
            number = first
            try:
                for batch in _batches(table, group, columns):
                    if number >= stop:
                        return
                    if number + batch.num_rows > range.start:
                        for i, row in enumerate(_batch_rows(batch), number):
                            if range.start <= i < stop:
                                yield i + 1, row
                    number += batch.num_rows
            except StoreError:
                raise
            except _errors() as e:
                if range.start <= number < stop:
                    faults.append(
                        f"{file.path}, row group {group}: expected rows, cannot be decoded: "
                        f"{' '.join(str(e).split())}"
                    )

        def parse(row: Any, location: str) -> Document:
            return _document(file, field, row, location)

        count = 0
        try:
            for document in parse_rows(
                rows(), parse, str(file.path), "row", counts=skipped, reason="row: malformed",
                on_skip=on_skip, required=range == WHOLE_FILE,
            ):  # fmt: skip
                count += 1
                yield document
            if faults and not count and range == WHOLE_FILE:
                message = faults[0]
                faults.clear()
                raise InputError(message)
        finally:
            skipped.update({BROKEN_GROUP: len(faults)} if faults else {})
            for message in faults[:MAX_REPORTED_ROWS]:
                on_skip(message)
            if len(faults) > MAX_REPORTED_ROWS:
                more = len(faults) - MAX_REPORTED_ROWS
                on_skip(f"{file.path}: {more:,} more row groups that cannot be decoded")


def row_group_starts(file: SourceFile, raw: Any, unit_bytes: int) -> Iterator[int]:
    """Yield the rows, from the second range on, where ranges of about ``unit_bytes`` of decoded
    data begin: at row groups, or inside large ones. InputError: no Parquet file.
    """
    metadata = _open(file, raw).metadata
    first = size = 0
    for group in builtins.range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        group_bytes = metadata.row_group(group).total_byte_size
        if first and size >= unit_bytes:
            yield first
            size = 0
        slices = min(group_bytes // unit_bytes, MAX_GROUP_SLICES, rows)
        for i in builtins.range(1, slices):
            yield first + rows * i // slices
        first += rows
        size += group_bytes if slices < 2 else unit_bytes


def _open(file: SourceFile, raw: Any, dictionaries: Sequence[str] = ()) -> Any:
    """Open a file; ``dictionaries`` are columns that are read as entries of a dictionary."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{file.path}: expected the package pyarrow, which is not installed"
            " (pip install 'fastlm[data]')"
        ) from None
    try:
        return parquet.ParquetFile(
            raw, pre_buffer=False, page_checksum_verification=True, read_dictionary=dictionaries
        )
    except StoreError:
        raise
    except _errors() as e:
        reason = " ".join(str(e).split())
        raise InputError(f"{file.path}: expected a Parquet file: {reason}") from None


def _errors() -> tuple[type[BaseException], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, MemoryError)


def _columns(file: SourceFile, table: Any, field: str) -> list[str]:
    """Return the columns to read: the text and the metadata. InputError names the columns."""
    from pyarrow import types

    schema = table.schema_arrow
    names = [name for name in schema.names if schema.names.count(name) == 1]
    texts = [name for name in names if _is_text(schema.field(name).type)]
    if field not in texts:
        raise InputError(
            f"{file.path}: expected a column {field!r} with text, got the columns"
            f" {', '.join(f'{n} ({schema.field(n).type})' for n in names)[:500]}"
        )
    extra = [n for n in META_COLUMNS if n in names and n != field]
    return [field, *(n for n in extra if not types.is_nested(schema.field(n).type))]


def _is_text(type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    return any(
        check(type)
        for check in (
            types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
            types.is_large_binary,
        )
    )  # fmt: skip


def _batches(table: Any, group: int, columns: list[str]) -> Iterator[Any]:
    metadata = table.metadata.row_group(group)
    columns = _check_size(metadata, columns)
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    size = max(1, min(BATCH_BYTES // row_bytes, MAX_BATCH_ROWS))
    return table.iter_batches(
        batch_size=size, row_groups=[group], columns=columns, use_threads=False
    )


def _check_size(metadata: Any, columns: list[str]) -> list[str]:
    """Return the columns of a row group to read: the text, and the metadata that is short on the
    average. ValueError: the group would need too much memory.
    """
    chunks = [metadata.column(i) for i in builtins.range(metadata.num_columns)]
    sizes = {chunk.path_in_schema: chunk for chunk in chunks}
    rows = max(1, metadata.num_rows)
    text, *others = columns
    columns = [text]
    for name in others:
        if sizes[name].total_uncompressed_size <= MAX_META_CHARACTERS * rows:
            columns.append(name)
    unpacked = sum(sizes[name].total_uncompressed_size for name in columns)
    packed = sum(sizes[name].total_compressed_size for name in columns)
    if unpacked // rows * min(rows, PAGE_ROWS) > MAX_PAGE_BYTES:
        raise ValueError(f"{rows:,} rows of {unpacked // rows:,} bytes: a page would be too large")
    if unpacked > MAX_PACKED_BYTES and unpacked > MAX_RATIO * max(1, packed):
        raise ValueError(f"{unpacked:,} bytes in {packed:,}: no text is packed so small")
    return columns


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | InputError]:
    """Yield the rows of a batch; a row with a text that is not UTF-8 is an InputError."""
    columns = dict(zip(batch.schema.names, batch.columns))
    for i in builtins.range(batch.num_rows):
        try:
            yield {name: column[i].as_py() for name, column in columns.items()}
        except (ValueError, OverflowError) as e:  # such as a date in the year 300,000
            yield InputError(f"expected UTF-8 and dates, got {e}")


def _document(file: SourceFile, field: str, row: dict[str, Any], location: str) -> Document:
    text = row.pop(field)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as e:
            raise InputError(f"expected UTF-8, got byte 0x{text[e.start]:02x}") from None
    if not isinstance(text, str):
        raise InputError(f"expected a text in {field!r}, got {type(text).__name__}")
    if len(text) > MAX_DOCUMENT_BYTES:
        raise InputError(f"expected a text of at most {MAX_DOCUMENT_BYTES:,} bytes, got more")
    meta = {name: value for name in row if (value := _scalar(row[name])) is not None}
    id = f"{file.name}:{location.rpartition(' ')[2]}"
    return Document(text, id, file.source, {"format": "text", **meta})


def _scalar(value: Any) -> str | int | float | None:
    """Return a value as JSON has it; None for what JSON has not."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, str):
        return value[:MAX_META_CHARACTERS]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value if isinstance(value, int | float) else None
