"""Ranges of source files: together they are the whole file, whatever the sizes and compression."""

import gzip
import json
import random
import time
from collections import Counter
from dataclasses import asdict
from hashlib import sha256

import pytest
import zstandard
from warc_records import record

from fastlm.errors import InputError
from fastlm.sources import plain_text, scan
from fastlm.sources.document import (
    CUT_SHORT,
    FAULTS,
    MAX_DOCUMENT_BYTES,
    UNREADABLE,
    FileRange,
    SourceFile,
)
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import read_file, read_files

PACKERS = {
    "plain": lambda parts: b"".join(parts),
    "gzip": lambda parts: gzip.compress(b"".join(parts)),
    "members": lambda parts: b"".join(map(gzip.compress, parts)),
    "zstd": lambda parts: zstandard.compress(b"".join(parts)),
    "frames": lambda parts: b"".join(map(zstandard.compress, parts)),
}
UNIT_BYTES = (1, 777, 5000, 1 << 20)


def source_file(path, format) -> SourceFile:
    return SourceFile(path, path.name, str(path), format, explicit=True)


def lines(count: int = 200) -> list[bytes]:
    """JSON lines of ragged sizes, some blank, some malformed, the last without a line break."""
    rng = random.Random(1)
    result = [b"\xef\xbb\xbf" + json.dumps({"text": "first"}).encode() + b"\n"]
    for i in range(count):
        row = json.dumps({"text": f"{i} ü " + "x" * rng.randrange(300)}).encode()
        result.append(rng.choice([row, row, row, b"", b"{oops"]) + b"\n")
    return [*result, b'{"text": "last"}']


def records(count: int = 60) -> list[bytes]:
    rng = random.Random(2)
    kinds = ["text/html", "text/html", "text/plain", "application/pdf"]
    return [
        record(i, b"<p>" + b"page " * rng.randrange(1, 200), rng.choice(kinds))
        for i in range(count)
    ]  # fmt: skip


def paragraphs() -> list[bytes]:
    rng = random.Random(3)
    parts = [
        b"word " * rng.randrange(40) + rng.choice([b"\n", b"\n\n", b"\n\n\n"]) for _ in range(200)
    ]
    return [*parts, b"x" * 900 + b"\n", b"\n" * 900, b"y\n" * 900, b"\n\nlast"]


CONTENTS = {"jsonl": lines, "warc": records, "text": paragraphs}


def read_whole(file) -> tuple[list, Counter]:
    skipped: Counter[str] = Counter()
    return list(read_file(file, skipped=skipped)), skipped


def read_ranges(file, ranges) -> tuple[list, Counter]:
    skipped: Counter[str] = Counter()
    documents = read_files([file] * len(ranges), ranges=ranges, skipped=skipped)
    return list(documents), skipped


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("format", CONTENTS)
def test_the_ranges_are_the_whole_file(tmp_path, monkeypatch, format, packer):
    monkeypatch.setattr(plain_text, "PIECE_BYTES", 512)
    monkeypatch.setattr(scan, "READ_BYTES", 300)
    path = tmp_path / f"a.{format}"
    path.write_bytes(data := PACKERS[packer](CONTENTS[format]()))
    file = source_file(path, format)
    whole = read_whole(file)
    assert len(whole[0]) > 30
    numbers = []
    for unit_bytes in UNIT_BYTES:
        result = scan_file(file, unit_bytes=unit_bytes)
        assert (result.sha256, result.size) == (sha256(data).hexdigest(), len(data))
        assert json.loads(json.dumps(asdict(result)))["ranges"]
        assert read_ranges(file, result.ranges) == whole
        is_seekable = packer == "plain" or (packer, format) == ("members", "warc")
        assert all(r.offset for r in result.ranges[1:]) == is_seekable or len(result.ranges) == 1
        numbers.append(len(result.ranges))
        backwards = [read_ranges(file, [r])[0] for r in reversed(result.ranges)]
        assert [d for documents in reversed(backwards) for d in documents] == whole[0]
    assert numbers[0] > 20 and numbers[1] > numbers[2] and numbers[3] == 1
    assert numbers[0] <= scan.MAX_SKIPPING_RANGES or is_seekable


@pytest.mark.parametrize("packer", ["gzip", "members", "zstd", "frames"])
@pytest.mark.parametrize("is_damaged", [False, True], ids=["cut", "damaged"])
def test_lines_before_a_fault_of_the_compression_are_kept(tmp_path, packer, is_damaged):
    rng = random.Random(5)
    rows = [json.dumps({"text": f"{i} {rng.random()} " * 50}).encode() + b"\n" for i in range(999)]
    data = bytearray(PACKERS[packer](rows))
    middle = len(data) * 2 // 3
    if is_damaged:
        data[middle : middle + 40] = rng.randbytes(40)
    else:
        del data[middle:]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    file = source_file(path, "jsonl")
    messages: list[str] = []
    skipped: Counter[str] = Counter()
    documents = list(read_file(file, skipped=skipped, on_skip=messages.append))
    assert len(documents) > 300
    assert [d.text for d in documents] == [
        json.loads(row)["text"] for row in rows[: len(documents)]
    ]
    assert skipped == {CUT_SHORT: 1} and set(skipped) <= FAULTS
    (message,) = messages
    assert message.endswith(f"kept the {len(documents)} documents before it")
    for unit_bytes in (1000, 15_000):
        ranges = scan_file(file, unit_bytes=unit_bytes).ranges
        assert len(ranges) > 1 and read_ranges(file, ranges) == (documents, skipped)


def test_a_file_of_bad_lines_is_refused_whole_and_counted_in_ranges(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{oops\n" * 50)
    file = source_file(path, "jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: expected"):
        read_whole(file)
    ranges = scan_file(file, unit_bytes=100).ranges
    assert len(ranges) == 3
    assert read_ranges(file, ranges) == ([], {"line: malformed": 50})


HOSTILE = {
    "nesting": b"[" * 200_000, "NUL bytes": b'{"text": "a\0b"}', "a NUL line": b"\0" * 99,
    "charset": '{"text": "Grüße"}'.encode("latin-1"), "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "number": b'{"text": ' + b"9" * 5000 + b"}", "endless": b"x" * (MAX_DOCUMENT_BYTES + 2),
}  # fmt: skip


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_costs_itself_alone(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "first"}', line, b'{"text": "last"}']))
    file = source_file(path, "jsonl")
    documents, skipped = read_whole(file)
    assert [d.text for d in documents] == ["first", "last"]
    assert skipped == {"line: malformed": 1}
    ranges = scan_file(file, unit_bytes=10).ranges
    assert read_ranges(file, ranges) == (documents, skipped)


def test_a_bad_file_is_counted_in_the_range_that_meets_the_fault(tmp_path):
    path = tmp_path / "a.txt"
    text = b"a paragraph of text\n\n" * 60_000
    path.write_bytes(text + b"\xff" + text)
    file = source_file(path, "text")
    with pytest.raises(InputError, match=r"a\.txt, line 120001: expected UTF-8, got byte 0xff"):
        read_whole(file)
    ranges = scan_file(file, unit_bytes=1).ranges
    documents, skipped = read_ranges(file, ranges)
    assert skipped == {UNREADABLE: 1} and len(documents) == len(ranges) - 1 > 2
    path.write_bytes(b"")
    assert scan_file(file, unit_bytes=1).ranges == (FileRange(),)
    with pytest.raises(InputError, match="unit_bytes: expected 1 or more, got 0"):
        scan_file(file, unit_bytes=0)


@pytest.mark.parametrize("content", [b"x" * 5_000_000, b"\n" * 5_000_000, b"{}\n" * 2_000_000])
def test_a_scan_is_linear_in_bounded_memory(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    start = time.process_time()
    result = scan_file(source_file(path, "jsonl"), unit_bytes=1 << 20)
    assert time.process_time() - start < 2
    assert len(result.ranges) == (1 if content[:1] == b"x" else -(-len(content) // (1 << 20)))
