"""WARC archives: broken records, policy files, the habits of GNU wget, headers and bounds."""

import gzip
import random
import zlib
from collections import Counter

import pytest
import zstandard
from peak import growth
from warc_records import record, wget_archive

from fastlm.errors import InputError
from fastlm.sources import warc
from fastlm.sources.document import (
    BROKEN_RECORD,
    CUT_SHORT,
    FAULTS,
    MAX_DOCUMENT_BYTES,
    OVERSIZE,
    SourceFile,
)
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import read_file, read_files

PACKERS = {
    "plain": lambda parts: b"".join(parts),
    "members": lambda parts: b"".join(map(gzip.compress, parts)),
    "gzip": lambda parts: gzip.compress(b"".join(parts)),
    "zstd": lambda parts: zstandard.compress(b"".join(parts)),
}


@pytest.fixture
def archive(tmp_path):
    """A function that writes bytes as an archive."""

    def write(data: bytes, name: str = "a.warc") -> SourceFile:
        (tmp_path / name).write_bytes(data)
        return SourceFile(tmp_path / name, name, str(tmp_path), "warc", explicit=True)

    return write


def read(file) -> tuple[list[int], Counter, list[str]]:
    """Return the numbers of the records that became documents, the counts and the messages."""
    skipped: Counter[str] = Counter()
    messages: list[str] = []
    documents = read_file(file, skipped=skipped, on_skip=messages.append)
    return [int(d.id.rpartition(":")[2][:-1]) for d in documents], skipped, messages


def pages(count: int = 5) -> list[bytes]:
    return [record(i, b"<p>page %d " % i + b"words " * 20) for i in range(count)]


def declare(page: bytes, length: bytes) -> bytes:
    """Return a record whose own length is ``length``; that of the HTTP body stays."""
    head, block = page.split(b"\r\n\r\n", 1)
    return head[: head.rindex(b" ") + 1] + length + b"\r\n\r\n" + block


BREAKS = {
    "version": lambda page: page.replace(b"WARC/1.0", b"WXRC/1.0"),
    "zeros": lambda page: bytes(len(page)),
    "noise": lambda page: random.Random(0).randbytes(len(page)),
    "too short": lambda page: declare(page, b"60"),
    "too long": lambda page: declare(page, b"400"),
    "far too long": lambda page: declare(page, b"999999999"),
    "overflow": lambda page: declare(page, b"9" * 30),
    "negative": lambda page: declare(page, b"-5"),
    "no number": lambda page: declare(page, b"many"),
    "half": lambda page: page[: len(page) // 2],
    "half a header": lambda page: page[:50],
    "endless header": lambda page: b"WARC/1.0\r\nX: " + b"y" * 200_000 + page[10:],
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("break_record", BREAKS.values(), ids=BREAKS)
def test_a_broken_record_is_counted_and_passed_over(archive, break_record, packer):
    parts = pages()
    parts[2] = break_record(parts[2])
    file = archive(PACKERS[packer](parts))
    numbers, skipped, messages = read(file)
    assert numbers == [0, 1, 3, 4]
    assert skipped == {BROKEN_RECORD: 1} and skipped.keys() <= FAULTS
    assert len(messages) == 1 and str(file.path) in messages[0] and "byte " in messages[0]
    ranges = scan_file(file, unit_bytes=1).ranges
    counts: Counter[str] = Counter()
    documents = read_files([file] * len(ranges), ranges=ranges, skipped=counts)
    assert [d.id for d in documents] == [f"a.warc:<urn:uuid:{n}>" for n in numbers]
    assert counts == skipped


HTTP_BREAKS = {
    "chunks": ("Transfer-Encoding: chunked", b"zz\r\nno chunk"),
    "gzip": ("Content-Encoding: gzip", gzip.compress(b"x" * 99)[:10] + b"no gzip"),
    "deflate": ("Content-Encoding: deflate", b"no deflate"),
    "three times": ("Content-Encoding: gzip, gzip, gzip", b"x"),
    "brotli": ("Content-Encoding: br", b"no brotli"),
    "zstd": ("Content-Encoding: zstd", b"no zstd"),
    "unknown": ("Content-Encoding: fax", b"x"),
}


@pytest.mark.parametrize(("header", "body"), HTTP_BREAKS.values(), ids=HTTP_BREAKS)
def test_a_body_that_cannot_be_decoded_is_counted(archive, header, body):
    parts = pages()
    parts[2] = record(2, body, headers=(header,))
    assert read(archive(b"".join(parts)))[:2] == ([0, 1, 3, 4], {BROKEN_RECORD: 1})


def test_a_broken_gzip_member_is_passed_over(archive):
    members = [gzip.compress(page) for page in pages()]
    good = members[2]
    for bad in (
        good[:40] + bytes(x ^ 255 for x in good[40:60]) + good[60:],
        good[:60], good[:10], b"\x1f\x8b\x08 no gzip", good[:-8] + bytes(8),
    ):  # fmt: skip
        members[2] = bad
        numbers, skipped, _ = read(archive(b"".join(members)))
        assert numbers == [0, 1, 3, 4] or (bad[:-8] == good[:-8] and numbers == [0, 1, 2, 3, 4])
        assert skipped == {BROKEN_RECORD: 1}


def test_random_damage_loses_only_what_it_touches(archive):
    """Nothing but InputError is raised, and the ranges are the whole file."""
    rng = random.Random(4)
    for trial in range(80):
        packer = rng.choice(list(PACKERS))
        data = bytearray(PACKERS[packer](parts := pages(6)))
        start, size = rng.randrange(len(data)), rng.randrange(1, 40)
        data[start : start + size] = rng.choice([b"", rng.randbytes(size), bytes(size)])
        file = archive(bytes(data))
        ranges = scan_file(file, unit_bytes=rng.choice([1, 300, 900])).ranges
        skipped: Counter[str] = Counter()
        try:
            ids = [d.id for d in read_file(file, skipped=skipped)]
        except InputError as e:
            assert str(file.path) in str(e), trial
            assert packer in ("gzip", "zstd") or start < 10, trial  # else most of it is readable
            continue
        assert len(set(ids)) == len(ids) <= 6, trial
        if packer in ("plain", "members"):
            stored = parts if packer == "plain" else list(map(gzip.compress, parts))
            ends = [sum(map(len, stored[: i + 1])) for i in range(6)]
            intact = {
                f"a.warc:<urn:uuid:{i}>"
                for i, end in enumerate(ends)
                if start > end + 4 or start + size < end - len(stored[i]) - 4
            }
            assert set(ids) >= intact, (trial, packer, start, size)
        counts: Counter[str] = Counter()
        documents = read_files([file] * len(ranges), ranges=ranges, skipped=counts)
        assert [d.id for d in documents] == ids, trial
        assert counts == skipped, trial


def test_a_cut_archive_keeps_what_is_before(archive):
    data = b"".join(pages())
    for cut in (1, 4, 30, 200, 400):
        numbers, skipped, messages = read(archive(data[:-cut]))
        assert numbers == [0, 1, 2, 3] and skipped == {CUT_SHORT: 1}
        assert "its last record is cut short" in messages[0]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_only_a_file_without_a_record_is_refused(archive, pack):
    for content in (b"no archive\n" * 99, b"", b"WARC/1.0\r\n", b"WARC/9.9\r\nX: y\r\n\r\n"):
        with pytest.raises(InputError, match="expected a WARC archive"):
            read(archive(pack(content)))
    file = archive(pack(b"rubbish\r\n" + b"".join(pages(2))))
    assert read(file)[:2] == ([0, 1], {BROKEN_RECORD: 1})


def test_a_file_that_was_not_named_is_counted_once(archive, tmp_path):
    archive(b"no archive", "a.warc")
    archive(b"".join(pages(1)), "b.warc")
    skipped: Counter[str] = Counter()
    files = [SourceFile(tmp_path / n, n, "s", "warc") for n in ("a.warc", "b.warc")]
    assert [d.id for d in read_files(files, skipped=skipped)] == ["b.warc:<urn:uuid:0>"]
    assert skipped == {"file: unreadable": 1}


def test_the_habits_of_wget(archive):
    file = archive(wget_archive("http://example.org/", b"<p>the page"))
    skipped: Counter[str] = Counter()
    (page,) = read_file(file, skipped=skipped)
    assert skipped == {warc.POLICY_RECORD: 1, warc.NO_PAGE: 2}  # its arguments and its log
    assert (page.text, page.meta["url"]) == ("<p>the page", "http://example.org/")
    (policy,) = scan_file(file, unit_bytes=1).policies
    assert policy == warc.PolicyFile(
        "http://example.org/robots.txt", "2024-01-01T00:00:00Z", 200, "User-agent: *\nDisallow: /x"
    )


RSL = b'<rsl xmlns="https://rslstandard.org/rsl"><content url="/"/></rsl>'
POLICIES = {
    "robots.txt": ("/robots.txt", "text/plain", "200 OK", b"User-agent: *"),
    "missing": ("/robots.txt", "text/html", "404 Not Found", b"<p>nothing here"),
    "server error": ("/robots.txt?x", "text/html", "503 No", b"<p>later"),
    "tdmrep": ("/.well-known/tdmrep.json", "application/json", "200 OK", b"[]"),
    "ai.txt": ("/ai.txt", "text/plain", "200 OK", b"User-Agent: *"),
    "licence": ("/terms/license.xml", "application/rsl+xml", "200 OK", RSL),
    "licence as XML": ("/a.xml", "text/xml", "200 OK", RSL),
}
NO_POLICIES = {
    "page about it": ("/docs/robots.txt", "text/plain", "200 OK", b"how to"),
    "page": ("/license.html", "text/html", "200 OK", b"<p>MIT"),
    "site map": ("/sitemap.xml", "text/xml", "200 OK", b"<urlset/>"),
}


@pytest.mark.parametrize("name", POLICIES | NO_POLICIES)
def test_policy_files_are_no_documents(archive, name):
    path, kind, status, body = (POLICIES | NO_POLICIES)[name]
    url = f"https://example.org{path}"
    file = archive(record(1, body, kind, status, url=url) + pages(1)[0])
    policies = scan_file(file, unit_bytes=1 << 20).policies
    ids = read(file)[0]
    if name in POLICIES:
        date = "2024-01-01T00:00:00Z"
        assert policies == (warc.PolicyFile(url, date, int(status[:3]), body.decode()),)
        assert ids == [0]
    else:
        assert policies == () and ids == ([0] if kind == "text/xml" else [1, 0])


def test_a_policy_file_is_bounded(archive):
    text = b"User-agent: *\n" * 50_000
    file = archive(record(1, text, "text/plain", url="http://a.org/robots.txt"))
    result = scan_file(file, unit_bytes=1)
    assert result.policies[0].text.encode() == text[: warc.MAX_POLICY_BYTES]
    assert result.skipped == {"policy over the size limit": 1} and set(result.skipped) <= FAULTS


def test_a_page_has_its_date_and_the_headers_that_matter(archive):
    headers = (
        "X-Robots-Tag: noai", "x-robots-tag: noindex", "Content-Usage: train-ai=n",
        "tdm-reservation: 1", "Link: </a.xml>; rel=license", "Set-Cookie: user=1",
        "X-Forwarded-For: 192.0.2.7", "Content-Length: 12", "ETag: " + "x" * 20_000,
    )  # fmt: skip
    (page,) = read_file(archive(record(1, b"<p>x", headers=headers, date="2999-01-01T00:00:00Z")))
    assert page.meta.pop("headers") == {
        "content-type": "text/html; charset=utf-8", "x-robots-tag": "noai\nnoindex",
        "content-usage": "train-ai=n", "tdm-reservation": "1", "link": "</a.xml>; rel=license",
        "etag": "x" * warc.MAX_HEADER_VALUE,
    }  # fmt: skip
    # a date in the future is the crawler's: kept as it is, and nothing is compared with the clock
    assert page.meta == {
        "format": "html", "url": "http://example.org/1", "date": "2999-01-01T00:00:00Z",
    }  # fmt: skip
    (bare,) = read_file(archive(record(1, b"plain", "text/plain", type="conversion")))
    assert "headers" not in bare.meta


def test_the_largest_page_and_bombs(archive):
    """16 MiB is read, more is counted, in bounded memory."""
    parts = [
        record(0, b"x" * MAX_DOCUMENT_BYTES), record(1, b"x" * (MAX_DOCUMENT_BYTES + 1)),
        record(2, b"x" * (3 * MAX_DOCUMENT_BYTES)),
        record(3, gzip.compress(bytes(400 << 20)), headers=("Content-Encoding: gzip",)),
        record(4, b"\0\0\0 zeros"), record(5, b"Gr\xfc\xdfe"), record(6, b"<div>" * 10**6),
    ]  # fmt: skip
    file = archive(b"".join(parts))
    del parts
    results: list = []
    # the page five times (block, record, body, text, the one before), none of the bomb's 400 MiB
    assert growth(lambda: results.append(read(file))) < 180
    assert results[0][:2] == ([0, 4, 5, 6], {OVERSIZE: 3})


def test_equal_ids_and_no_id(archive):
    """Equal record ids stay equal: to forget one of the documents forgets all of them."""
    page = record(1, b"<p>x")
    nameless = page.replace(b"WARC-Record-ID: <urn:uuid:1>\r\n", b"")
    ids = [d.id for d in read_file(archive(page + page + nameless))]
    assert ids == ["a.warc:<urn:uuid:1>"] * 2 + ["a.warc:http://example.org/1"]


def test_encoded_bodies(archive):
    body = b"<p>" + b"words " * 50
    deflate, chunks = zlib.compress(body), b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    gzipped = gzip.compress(body)
    encoded = [
        (gzipped, "Content-Encoding: gzip"),
        (gzip.compress(gzipped), "Content-Encoding: gzip, GZIP"),
        (deflate, "content-encoding: deflate"),
        (zstandard.compress(body), "Content-Encoding: zstd"),
        (chunks, "Transfer-Encoding: chunked"), (body, "Content-Encoding: identity"),
        (body, "Content-Encoding: gzip"),  # the crawler decoded it
    ]  # fmt: skip
    parts = [record(i, data, headers=(header,)) for i, (data, header) in enumerate(encoded)]
    assert [d.text.encode() for d in read_file(archive(b"".join(parts)))] == [body] * len(parts)


@pytest.mark.parametrize("packer", ["plain", "members", "gzip"])
def test_broken_records_are_read_again_a_bounded_number_of_times(archive, packer, monkeypatch):
    """Records that declare more than the file has took quadratic time: 3,000 members 280 s."""
    monkeypatch.setattr(warc, "MIN_REREAD_BYTES", 0)
    total = 0
    read_stream = warc._Stream.read

    def read_and_count(self, size=-1):
        nonlocal total
        data = read_stream(self, size)
        total += len(data)
        return data

    monkeypatch.setattr(warc._Stream, "read", read_and_count)
    parts = [declare(page, b"999999") for page in pages(400)]
    whole = pages(3)
    file = archive(PACKERS[packer](whole + parts), "a.warc.gz" if packer != "plain" else "a.warc")
    numbers, skipped, _ = read(file)
    assert total < 12 * sum(map(len, whole + parts))  # 400 times its half before
    assert numbers == [0, 1, 2] and skipped[CUT_SHORT] == 1 and skipped[BROKEN_RECORD] < 12
