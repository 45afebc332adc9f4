"""Parquet files as sources: columns, ranges, corrupt groups, hostile values."""

import random
import sys
from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from peak import growth

from fastlm.errors import InputError
from fastlm.sources.document import BROKEN_GROUP, FAULTS, MAX_DOCUMENT_BYTES, SourceFile
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import list_files, read_file, read_files

ROWS, GROUP = 240, 40


def write(path, columns: dict, **options) -> SourceFile:
    parquet.write_table(pa.table(columns), path, **{"row_group_size": GROUP, **options})
    return SourceFile(path, path.name, "s", "parquet", explicit=True)


@pytest.fixture
def file(tmp_path):
    texts = [f"text {i} ü" + "x" * i for i in range(ROWS)]
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    return write(tmp_path / "a.parquet", {"n": range(ROWS), "text": texts}, **options)


def damage(file: SourceFile, group: int) -> None:
    column = parquet.ParquetFile(file.path).metadata.row_group(group).column(1)
    data = bytearray(file.path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size  # its start is a header
    data[end - 9 : end] = bytes(byte ^ 255 for byte in data[end - 9 : end])
    file.path.write_bytes(data)


def read(file, ranges=None, **options) -> tuple[list, Counter]:
    skipped: Counter[str] = Counter()
    files = [file] * (1 if ranges is None else len(ranges))
    return list(read_files(files, ranges=ranges, skipped=skipped, **options)), skipped


def test_a_text_column_and_metadata(tmp_path):
    date = datetime(2999, 1, 2, tzinfo=UTC)
    columns = {
        "body": ["one", None, "three"], "url": ["u", None, "w"], "id": [7, 8, 9],
        "date": [date, date, None], "language": pa.array(["de", "en", "de"]).dictionary_encode(),
        "other": ["x"] * 3,
    }  # fmt: skip
    path = tmp_path / "in"
    path.mkdir()
    write(path / "a.parquet", columns)
    files, _ = list_files(str(path), cache=tmp_path)
    skipped: Counter[str] = Counter()
    first, third = read_files(files, field="body", skipped=skipped)
    assert skipped == {"row: malformed": 1} and set(skipped) <= FAULTS
    assert (first.id, first.text, third.id) == ("a.parquet:1", "one", "a.parquet:3")
    assert first.meta == {
        "format": "text", "url": "u", "id": 7, "date": "2999-01-02T00:00:00+00:00",
        "language": "de",
    }  # fmt: skip
    assert third.meta == {"format": "text", "url": "w", "id": 9, "language": "de"}


@pytest.mark.parametrize("bad_group", [None, 0, 3, 5])
def test_the_ranges_are_the_whole_file_also_with_a_corrupt_group(file, bad_group):
    if bad_group is not None:
        damage(file, bad_group)
    documents, skipped = read(file)
    good = [i + 1 for i in range(ROWS) if bad_group is None or i // GROUP != bad_group]
    assert [d.id for d in documents] == [f"a.parquet:{i}" for i in good]
    assert skipped == ({} if bad_group is None else {BROKEN_GROUP: 1})
    numbers = []
    for unit_bytes in (1, 300, 5000, 20_000, 1 << 20):
        ranges = scan_file(file, unit_bytes=unit_bytes).ranges
        assert read(file, ranges) == (documents, skipped)
        numbers.append(len(ranges))
    assert numbers[0] > ROWS // GROUP and numbers[-1] == 1 and numbers == sorted(numbers)[::-1]


def test_what_is_no_parquet_or_lacks_the_column(file, tmp_path):
    for options, match in (
        ({"field": "content"}, r"a\.parquet: expected a column 'content' with text, got the columns"
         r" n \(int64\), text \(string\)"),
        ({"field": "n"}, "expected a column 'n' with text"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            read(file, **options)
    data = file.path.read_bytes()
    for content in (b"", b"PAR1", data[:-9], data[:200], b"PAR1" + data[-300:], data[::-1]):
        file.path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet: expected") as e:
            read(file)
        assert "\n" not in str(e.value)
        assert len(scan_file(file, unit_bytes=1).ranges) == 1
    for group in range(ROWS // GROUP):
        file.path.write_bytes(data if group == 0 else file.path.read_bytes())
        damage(file, group)
    with pytest.raises(InputError, match="row group 0: expected rows, cannot be decoded"):
        read(file)


def test_bytes_that_are_no_text_and_long_texts(tmp_path):
    values = [b"good", b"Gr\xfc\xdfe", b"a\0b", b"x" * (MAX_DOCUMENT_BYTES + 1), b"last"]
    for type in (pa.binary(), pa.large_string()):
        array = (
            pa.array(values, pa.binary()).cast(pa.large_binary()).view(type)
            if (type == pa.large_string())
            else pa.array(values, type)
        )
        file = write(tmp_path / "b.parquet", {"text": array})
        documents, skipped = read(file)
        assert [d.text for d in documents] == ["good", "a\0b", "last"]
        assert skipped == {"row: malformed": 2}


def test_a_large_group_is_read_in_bounded_memory(tmp_path):
    """A group of 200 MB; the file has 1 MB."""
    path = tmp_path / "c.parquet"
    schema = pa.schema([("text", pa.string())])
    text = "word " * 20_000
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(pa.table({"text": [text] * 2000}), row_group_size=2000)
    file = SourceFile(path, path.name, "s", "parquet", explicit=True)
    counts: list[int] = []
    assert growth(lambda: counts.append(sum(1 for _ in read_file(file)))) < 100
    assert counts == [2000]


def test_without_pyarrow_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"expected the package pyarrow.*fastlm\[data\]"):
        read(file)


LONG = "x" * (8 << 20)


@pytest.mark.parametrize("use_dictionary", [False, True])
@pytest.mark.parametrize("columns", [["text"], ["text", "url", "id", "language"]])
def test_a_page_of_long_texts_takes_little_memory(tmp_path, use_dictionary, columns):
    """300 texts of 8 MiB, 229 KB on disk, took 2.4 GB: pyarrow decodes them as one page."""
    long = pa.array([LONG]).take(pa.array([0] * 100))
    options = {"compression": "zstd", "use_dictionary": use_dictionary, "row_group_size": 100}
    file = write(tmp_path / "a.parquet", dict.fromkeys(columns, long), **options)
    texts = 0

    def count():
        nonlocal texts
        skipped: Counter[str] = Counter()
        try:
            texts = sum(len(d.text) for d in read_file(file, skipped=skipped))
        except InputError as error:
            assert "no text is packed so small" in str(error)

    assert growth(count) < 200 << 20
    assert texts == (100 * len(LONG) if use_dictionary else 0)


def test_rows_that_are_too_long_for_a_page_are_refused(tmp_path):
    noise = [random.Random(i).randbytes(3 << 20).hex() for i in range(3)]  # 6 MiB, not compressible
    file = write(tmp_path / "a.parquet", {"text": noise}, use_dictionary=False)
    assert len(read(file)[0]) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm.sources.parquet.MAX_PAGE_BYTES", 16 << 20)
        with pytest.raises(InputError, match=r"3 rows of 6,291,4.. bytes: a page would be too"):
            read(file)
