"""Ranges of source files: together they are the whole file, whatever the sizes and compression."""

import gzip
import json
import random
from collections import Counter
from dataclasses import asdict
from hashlib import sha256

import pytest
import zstandard
from warc_records import record

from fastlm.sources import plain_text, scan
from fastlm.sources.document import SourceFile
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
