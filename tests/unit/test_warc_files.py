"""Writing WARC files: whole records after a kill, sizes, and finding pages again."""

import gzip
from datetime import datetime, timedelta, timezone
from io import BytesIO

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType

from fastlm.data.warc_files import (
    PageIndex,
    WarcWriter,
    complete_files,
    last_member_end,
    read_pages,
    warc_paths,
)
from fastlm.errors import InputError

NOON = datetime(2026, 8, 13, 14, 0, 0, 999, timezone(timedelta(hours=2)))
HTML = (b"Content-Type", b"text/html; charset=utf-8")


def writer(folder, **options):
    return WarcWriter(folder, {"software": "test", "robots": "obey"}, **options)


def write(out, url="http://a.example/1", headers=(HTML,), body=b"<p>text", status="200 OK"):
    return out.write(url, NOON, f"HTTP/1.1 {status}", headers, body, {})


def kill(out):
    """End a writer as a killed process does: its file stays unfinished."""
    out._file.close()
    out._file = None


def records(path):
    with open(path, "rb") as file:
        return [
            (r.headers.get("WARC-Type"), r.headers.get("WARC-Target-URI"), r.reader.read())
            for r in ArchiveIterator(file)
        ]


def test_a_record_has_date_headers_and_body(tmp_path):
    out = writer(tmp_path)
    sent = [
        HTML,
        (b"Content-Encoding", b"gzip"),
        (b"Content-Length", b"12"),
        (b"X-A", b"\xe9\r\n b"),
    ]
    write(out, headers=[*sent, (b"X-A", b"2")])
    assert [path.name for path in warc_paths(tmp_path)] == ["crawl-00000.warc.gz.part"]
    out.close()
    (path,) = warc_paths(tmp_path)
    assert path.name == "crawl-00000.warc.gz"
    with open(path, "rb") as file:
        for record in ArchiveIterator(file, WarcRecordType.response):
            assert record.headers["WARC-Date"] == "2026-08-13T12:00:00Z"
            headers = record.http_headers.items_bytes()
            assert record.reader.read() == b"<p>text"
    assert headers == (
        HTML, (b"X-Crawler-Content-Encoding", b"gzip"), (b"X-Crawler-Content-Length", b"12"),
        (b"X-A", b"\xe9  b"), (b"X-A", b"2"), (b"Content-Length", b"7"),
    )  # fmt: skip


def test_warcinfo_says_what_crawled(tmp_path):
    out = writer(tmp_path)
    write(out)
    out.close()
    assert records(out.folder / "crawl-00000.warc.gz")[0] == (
        "warcinfo", None, b"software: test\r\nrobots: obey\r\n",
    )  # fmt: skip


def test_files_rotate_and_numbers_continue(tmp_path):
    out = writer(tmp_path, max_file_bytes=2000)
    for i in range(20):
        write(out, f"http://a.example/{i}", body=bytes(range(256)))
    out.close()
    paths = warc_paths(tmp_path)
    assert len(paths) > 3 and all(path.stat().st_size < 3000 for path in paths)
    again = writer(tmp_path)
    write(again, "http://a.example/20")
    again.close()
    assert [p.name for p in warc_paths(tmp_path)] == [
        f"crawl-{i:05}.warc.gz" for i in range(len(paths) + 1)
    ]
    urls = [url for path in warc_paths(tmp_path) for kind, url, _ in records(path) if url]
    assert urls == [f"http://a.example/{i}" for i in range(21)]


@pytest.mark.parametrize("tail", [1, 9, 40])
@pytest.mark.parametrize("garbage", [b"", b"\xff" * 5000, b"\x1f\x8b\x08\0\0\0\0\0\0\xff"])
def test_a_killed_file_keeps_its_whole_records(tmp_path, tail, garbage):
    out = writer(tmp_path)
    ends = [write(out, f"http://a.example/{i}")[1] for i in range(3)]
    kill(out)
    path = tmp_path / "crawl-00000.warc.gz.part"
    data = path.read_bytes()
    path.write_bytes(data[:-tail] + garbage)
    complete_files(tmp_path)
    path = tmp_path / "crawl-00000.warc.gz"
    assert path.read_bytes() == data[: ends[2]]
    assert [url for _, url, _ in records(path)][1:] == ["http://a.example/0", "http://a.example/1"]


def test_a_killed_file_without_a_record_is_deleted(tmp_path):
    (tmp_path / "crawl-00000.warc.gz.part").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "other.warc.gz.part").write_bytes(b"not ours")
    complete_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.warc.gz.part"]


def test_the_end_of_members_larger_than_a_read(monkeypatch):
    monkeypatch.setattr("fastlm.data.warc_files.READ_BYTES", 100)
    members = [gzip.compress(bytes(1_000_000)), gzip.compress(bytes(range(256)) * 9)]
    data = b"".join(members)
    assert last_member_end(BytesIO(data)) == len(data)
    assert last_member_end(BytesIO(data[:-1])) == len(members[0])
    assert last_member_end(BytesIO(b"")) == 0


def test_too_many_headers_are_refused_and_nothing_is_written(tmp_path):
    out = writer(tmp_path)
    _, offset = write(out)
    with pytest.raises(InputError, match="expected 16,384 bytes of headers"):
        write(out, headers=[HTML, (b"X-Long", b"x" * 17_000)])
    assert write(out)[1] > offset
    out.close()
    assert len(records(tmp_path / "crawl-00000.warc.gz")) == 3


def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch):
    out = writer(tmp_path)
    write(out)
    file, size = out._file, out.path.stat().st_size

    class Full:
        tell, seek, truncate = file.tell, file.seek, file.truncate

        def write(self, data):
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return file.write(data[:20])

    out._file = Full()
    with pytest.raises(OSError):
        write(out)
    assert out.path.stat().st_size == size
    file.close()


def test_the_index_finds_pages_only(tmp_path):
    out = writer(tmp_path)
    write(out, "http://a.example/1", body=b"old")
    write(out, "http://a.example/1", body=b"new", headers=[HTML, (b"ETag", b'"x"')])
    write(out, "http://a.example/404", status="404 Not Found")
    write(out, "http://a.example/i", headers=[(b"Content-Type", b"image/png")])
    for path in ("/robots.txt", "/ai.txt", "/.well-known/tdmrep.json"):
        write(out, f"http://a.example{path}", headers=[(b"Content-Type", b"text/plain")])
    out.close()
    index = PageIndex(str.lower)
    assert [page.body for page in index.read(warc_paths(tmp_path))] == [b"old", b"new"]
    page = index.find("HTTP://A.example/1")
    assert (page.body, page.date, page.header("etag")) == (b"new", "2026-08-13T12:00:00Z", b'"x"')
    assert page.header("last-modified") == b""
    assert len(index) == 1 and index.find("http://a.example/404") is None
    warc_paths(tmp_path)[0].unlink()
    assert index.find("http://a.example/1") is None


def test_pages_of_wget_and_of_encoded_bodies_are_read(tmp_path):
    body = gzip.compress(b"<p>text")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: TEXT/html\r\nContent-Encoding: gzip\r\n\r\n"
    block = head + body
    path = tmp_path / "w.warc"
    path.write_bytes(
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: <http://a.example/>\r\n"
        b"WARC-Record-ID: <urn:uuid:1>\r\nWARC-Date: 2026-08-13T12:00:00Z\r\n"
        b"Content-Type: application/http; msgtype=response\r\n"
        b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(block), block)
    )
    ((_, page),) = read_pages(path)
    assert (page.url, page.body) == ("http://a.example/", b"<p>text")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="expected a WARC file"):
        list(read_pages(tmp_path / "none.warc.gz"))
