"""`fastlm data crawl` against servers that misbehave: what is stored, what is left out, and that a
crawl that is killed or stopped continues with what is missing.
"""

import fcntl
import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from random import Random

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType
from typer.testing import CliRunner
from warcio.checker import Checker
from web_site import RESET, http, web_site

from fastlm.cli import app
from fastlm.data.corpus import read_documents
from fastlm.data.crawl import CrawlOptions, crawl, read_seeds
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.warc_files import PageIndex, complete_files
from fastlm.errors import InputError
from fastlm.progress import silent

pytest.importorskip("scrapy")

PLAIN = {**os.environ, "no_proxy": "*", "OMP_NUM_THREADS": "1"}
POLICIES = ("/robots.txt", "/ai.txt", "/.well-known/ai.txt", "/.well-known/tdmrep.json")
NOT_FOUND = http(b"no", "404 Not Found")


def command(out, *arguments):
    words = ["data", "crawl", "-o", out, "--contact", "test@example.org", "--delay", 0, *arguments]
    return [sys.executable, "-m", "fastlm", *map(str, words)]


def run(out, *arguments, status=0):
    result = subprocess.run(
        command(out, *arguments), env=PLAIN, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == status, result.stderr
    return result


def summary(out):
    return json.loads((out / "crawl.json").read_text())


def responses(out):
    """Return (URL, status, date, headers, body) of every response of a crawl's WARC files."""
    found = []
    for path in sorted(out.glob("*.warc.gz")):
        with open(path, "rb") as file:
            for record in ArchiveIterator(file, WarcRecordType.response, strict_mode=True):
                headers = record.http_headers
                url = record.headers["WARC-Target-URI"]
                date, body = record.headers["WARC-Date"], record.reader.read()
                found.append((url, headers.status_code, date, dict(headers.items()), body))
    return found


def pages(out):
    """Return how often each path is stored, without policy files."""
    paths = (re.sub("https?://[^/]*", "", url) for url, *_ in responses(out))
    return Counter(path for path in paths if path not in POLICIES)


def is_whole(out):
    """Return whether the WARC files keep to the standard and their digests are right."""
    for path in out.glob("*.warc.gz"):
        checker = Checker(type("Arguments", (), {"inputs": [str(path)], "verbose": False}))
        if checker.process_all():
            return False
    return not list(out.glob("*.part"))


def tree(count, seconds=0.0):
    """Return a site of ``count`` pages; page n links to 2n + 1 and 2n + 2 and has an ETag."""

    def handler(host, path, headers):
        if path in POLICIES:
            return NOT_FOUND
        n = int(path[1:] or 0)
        if n >= count:
            return NOT_FOUND
        time.sleep(seconds)
        if headers.get("if-none-match") == f'"v{n}"':
            return http(b"", "304 Not Modified", None, f'ETag: "v{n}"', "X-Day: second")
        links = "".join(f"<a href='/{k}'>{k}</a>" for k in (2 * n + 1, 2 * n + 2) if k < count)
        text = " ".join(str(number) for number in Random(n).sample(range(10**6), 40))  # no copy
        body = f"<title>{n}</title><p>{text}</p>{links}".encode()
        return http(body, "200 OK", "text/html", f'ETag: "v{n}"', "X-Day: first")

    return handler


@pytest.fixture(scope="module")
def tree_crawl(tmp_path_factory):
    """Crawl 60 pages by a run that is killed, one that is stopped, and one that finishes."""
    out = tmp_path_factory.mktemp("crawl") / "out"
    with web_site(tree(60, 0.01)) as site:
        process = start(out, site, 15)
        process.kill()
        process.communicate(timeout=30)
        (part,) = out.glob("*.part")
        part.write_bytes(part.read_bytes() + b"\x1f\x8b\x08\0 a record that is cut")
        process = start(out, site, 35)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"Stopped (interrupted): the same command continues" in output
        assert summary(out)["end"] == "interrupted" and is_whole(out)
        run(out, site.url())
        yield site, out


def start(out, site, requests):
    """Start a crawl, and return its process after so many requests to the site."""
    words = command(out, site.url())
    process = subprocess.Popen(words, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(site.requests) <= requests:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    return process


def test_a_crawl_that_ended_early_continues(tree_crawl):
    """Every page is stored once, and the pages that were there are not downloaded again."""
    site, out = tree_crawl
    names = Counter(f"/{n or ''}" for n in range(60))
    assert pages(out) == names and is_whole(out)
    assert summary(out)["end"] == "finished" and summary(out)["pages"] == 60
    downloads = Counter(path for path in site.paths() if path not in POLICIES)
    assert set(downloads) == set(names)
    assert sum(downloads.values()) <= 62  # two pages were under way when the process was killed
    assert not (out / ".job").exists()


def test_the_crawl_says_who_it_is(tree_crawl):
    site, out = tree_crawl
    agents = {headers["user-agent"] for _, _, headers, _ in site.requests}
    assert agents == {f"fastlm/{version('fastlm')} (+test@example.org)"}
    stored = summary(out)
    assert stored["user_agent"] in agents and stored["versions"]["scrapy"] == version("scrapy")
    assert stored["files"] == {path.name: path.stat().st_size for path in out.glob("*.warc.gz")}


def test_a_finished_crawl_is_not_continued(tree_crawl, tmp_path):
    site, out = tree_crawl
    options = crawl_options(out, (site.url(),))
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="out: expected an empty folder or an unfinished crawl"):
        crawl(options)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_a_second_crawl_downloads_what_changed(tree_crawl, tmp_path):
    """Pages that the server confirms are stored again with today's date and headers."""
    site, out = tree_crawl
    old = {url: (date, body) for url, _, date, _, body in responses(out)}
    before = len(site.requests)
    run(tmp_path, site.url(), "--previous", out, "--depth", 3)
    asked = {path: headers for _, path, headers, _ in site.requests[before:]}
    assert asked["/3"]["if-none-match"] == '"v3"' and "if-none-match" not in asked["/ai.txt"]
    assert pages(tmp_path) == Counter(f"/{n or ''}" for n in range(15))
    assert summary(tmp_path)["unchanged"] == 15
    for url, status, date, headers, body in responses(tmp_path):
        if not url.endswith(POLICIES):
            assert (status, body) == (200, old[url][1]) and date >= old[url][0]
            assert headers["X-Day"] == "second" and headers["Content-Type"] == "text/html"
    with open(tmp_path / "crawl-00000.warc.gz", "rb") as file:
        fields = [r.headers.get("WARC-Refers-To-Date") for r in ArchiveIterator(file)]
    assert set(fields) - {None} <= {date for date, _ in old.values()} and len(set(fields)) > 1


def documents(folder, out):
    """Return the paths of the documents that `fastlm data prepare` makes of WARC files."""
    options = DataOptions(rules=(), min_paragraph=10_000)
    prepare([f"{folder}#*.warc.gz"], out, options=options, cache=out / "cache")
    splits = (read_documents(out, split) for split in ("train", "heldout"))
    urls = [document.meta["url"] for rows in splits for document in rows]
    return sorted(re.sub("https?://[^/]*", "", url) for url in urls)


def test_the_pages_of_a_crawl_become_documents(tree_crawl, tmp_path):
    _, out = tree_crawl
    assert documents(out, tmp_path / "corpus") == sorted(f"/{n or ''}" for n in range(60))


@pytest.mark.skipif(not shutil.which("wget"), reason="expected wget, not found (Debian: wget)")
def test_the_pages_of_wget_become_documents(tmp_path):
    """The command of docs/data.md, with less time between requests."""
    folder = tmp_path / "site"
    folder.mkdir()
    with web_site(tree(7)) as site:
        words = "wget --recursive --level=10 --warc-file=site --warc-max-size=1G --delete-after"
        words += " --no-verbose --tries=3 --timeout=30"
        urls = [site.url(path) for path in ("/", "/ai.txt", "/.well-known/tdmrep.json")]
        result = subprocess.run(
            [*words.split(), *urls], cwd=folder, env=PLAIN, capture_output=True, timeout=60
        )
    assert result.returncode == 8, result.stderr  # the policy files have status 404
    names = sorted(f"/{n or ''}" for n in range(7))
    assert documents(folder, tmp_path / "corpus") == names
    index = PageIndex(str)  # what --previous reads
    assert sorted(page.url for page in index.read(folder.glob("*.warc.gz"))) == [
        site.url(name) for name in names
    ]


def test_bounds_of_pages_bytes_and_depth(tmp_path):
    """A crawl that reached a bound continues with a larger one, never in another scope."""
    with web_site(tree(10**9)) as site:
        run(tmp_path, site.url(), "--max-pages", 10, "--depth", 3)
        stored = summary(tmp_path)
        assert stored["end"] == "max_pages" and stored["pages"] == pages(tmp_path).total()
        assert 10 <= stored["pages"] <= 12  # two requests may be under way
        options = crawl_options(tmp_path, (site.url(),), depth=4)
        with pytest.raises(InputError, match=r"depth: expected the value of .*, 3, got 4"):
            crawl(options)
        run(tmp_path, site.url(), "--max-bytes", 10_000, "--depth", 3)
    assert pages(tmp_path) == Counter(f"/{n or ''}" for n in range(15))
    assert summary(tmp_path)["end"] == "finished"
    assert summary(tmp_path)["policies"] == len(responses(tmp_path)) - 15


def test_a_full_disk_ends_a_crawl_that_continues_later(tmp_path):
    with web_site(tree(100)) as site:
        words = shlex.join(command(tmp_path / "out", site.url()))
        result = subprocess.run(
            ["bash", "-c", f"ulimit -f 16; exec {words}"],
            env=PLAIN, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert len(site.requests) < 100
    assert result.returncode == 2
    assert result.stderr.strip() == f"fastlm: {tmp_path}/out: cannot be written: File too large"
    assert not (tmp_path / "out" / "crawl.json").exists()
    complete_files(tmp_path / "out")  # as the next run does
    assert pages(tmp_path / "out").total() > 10 and is_whole(tmp_path / "out")


def test_the_bound_that_is_reached_first_ends_a_crawl(tmp_path):
    from fastlm.data.crawl_archive import Archive

    archive = Archive(crawl_options(tmp_path, max_pages=3, max_bytes=100), silent)
    assert archive.full == ""
    archive.pages, archive.bytes = 2, 99
    assert archive.full == ""
    archive.bytes = 100
    assert archive.full == "max_bytes"
    archive.pages = 3
    assert archive.full == "max_pages"
    archive.failure = OSError(28, "No space left on device")
    assert archive.full == "failure"


def crawl_options(out, seeds=("https://a.example/",), contact="test@example.org", **options):
    return CrawlOptions(seeds=seeds, out=out, contact=contact, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": ("a.example",)}, "seeds: expected a URL with https:// or a file"),
        ({"seeds": ("ftp://a.example/",)}, "seeds: expected a URL of http or https"),
        ({"seeds": ("https://[a/",)}, "seeds: expected a URL of http or https"),
        ({"seeds": ("https://a:99999/",)}, "seeds: expected a URL of http or https"),
        ({"seeds": ()}, "seeds: expected at least one URL"),
        ({"contact": "me"}, "contact: expected a web page or an e-mail"),
        ({"contact": "a@b.c\r\nX-A: b"}, "contact: expected a web page or an e-mail"),
        ({"agent": "Mozilla/5.0 (X11)"}, "agent: expected letters"),
        ({"domains": ("https://a.example",)}, "domains: expected a name like"),
        ({"max_pages": 0}, "max_pages: expected 1 or more"),
        ({"depth": -1}, "depth: expected 0 or more"),
        ({"delay": float("inf")}, "delay: expected 0 or more"),
        ({"timeout": 0.0}, "timeout: expected a positive number"),
        ({"max_page_bytes": 17 << 20}, "max_page_bytes: expected at most 16,777,216"),
        ({"previous": Path("missing")}, "previous: expected a folder with WARC files"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        crawl(crawl_options(tmp_path / "out", **options))
    assert not list(tmp_path.glob("out/.job/scope.json"))  # another try may have other options


def test_a_crawl_needs_its_extra_and_its_own_folder(tmp_path, monkeypatch):
    options = crawl_options(tmp_path)
    (tmp_path / ".job").mkdir()
    with open(tmp_path / ".job" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: expected a folder without a running crawl"):
            crawl(options)
    (tmp_path / "crawl-00000.warc.gz").touch()
    with pytest.raises(InputError, match="out: expected an empty folder or an unfinished crawl"):
        crawl(options)
    monkeypatch.setitem(sys.modules, "scrapy", None)
    with pytest.raises(InputError, match=r"not installed \(pip install 'fastlm\[crawl\]'\)"):
        crawl(options)


@pytest.mark.parametrize(
    "rules, expected",
    [
        ("nofollow", True),
        ("noindex, NoFollow", True),
        ("none", True),
        ("otherbot: nofollow", True),
        ("fastlm: none", True),
        ("", False),
        ("index,follow", False),
        ("max-image-preview:none, max-snippet:-1", False),
        ("otherbot: none", False),
        ("nofollow-up", False),
    ],
)
def test_rules_that_forbid_links(rules, expected):
    from fastlm.data.crawl_spider import forbids_links

    assert forbids_links(rules, "FastLM") is expected


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ('; rel="license"; type="application/rsl+xml"', True),
        ("; rel=license; type=application/rsl+xml", True),
        ('; type="application/rsl+xml"; rel="canonical license"', True),
        ('; rel="license"', False),
        ('; rel="license"; type="text/html"', False),
        ('; rel="next"; type="application/rsl+xml"', False),
    ],
)
def test_links_to_licence_files(parameters, expected):
    from fastlm.data.crawl_spider import is_licence_link

    assert is_licence_link(parameters) is expected


def test_a_crawl_without_a_page_fails(tmp_path, monkeypatch):
    counts = {"pages": 0, "bytes": 0, "policies": 4, "refused": {"robots.txt": 1}, "errors": {}}
    monkeypatch.setattr("fastlm.data.crawl.crawl", lambda *_: {"end": "finished", **counts})
    words = ["data", "crawl", "https://a.example/", "-o", str(tmp_path), "--contact", "a@b.c"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "fastlm: seeds: expected sites with pages to crawl, got 0 pages"
    )
    assert "robots.txt 1 left out" in result.stderr


def test_seeds_are_urls_and_files_of_urls(tmp_path):
    path = tmp_path / "seeds.txt"
    path.write_text("# sites\n\nhttps://a.example/\r\n  HTTP://b.example/x y\nhttps://a.example/\n")
    urls = ["https://c.example/", "https://a.example/", "HTTP://b.example/x y"]
    assert read_seeds(("https://c.example/", str(path))) == urls
    path.write_text("https://a.example/\nb.example\n")
    with pytest.raises(InputError, match=r"seeds.txt:2: expected a URL of http or https"):
        read_seeds((str(path),))


LICENCE = "application/rsl+xml"
BOMB = gzip.compress(bytes(100 << 20), 1)
WRONG_CHARSET = "<p>Gr\u00fc\u00dfe <a href='/f\u00fcr'>weiter</a>".encode("latin-1")
BAD_LINKS = """<a href="http://[bad"> <a href="mailto:a@b.c"> <a href="javascript:void(0)">
    <a href="//"> <a href="http://x:99999/"> <a href="ftp://127.0.0.1/"> <a href="data:text/html,x">
    <a href="file://127.0.0.1/etc/hostname"> <a href="/to-file"> <a href="\0"> <a href="?"> <a href="http://127.0.0.9:1/refused">"""
INDEX = """
    /loop /to/2 /chain/1 /endless /drip /charset /503 /bomb /headers /header /long /short /reset
    /garbage /typeless /picture /away /q?b=2&a=1 /q?a=1&b=2 /meta /header-nofollow /calendar/1 /deep
    /private /401 /304 /text /xhtml /encoding /empty /nul /robots.txt /status
""".split()


def stream(kind, piece, seconds=0.0):
    """Send a body without an end."""
    yield f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode()
    until = time.monotonic() + 15
    while time.monotonic() < until:
        yield piece
        time.sleep(seconds)


def hostile(host, path, headers):
    """Sites whose robots.txt differ at 127.0.0.2 and up, and bad pages at 127.0.0.1."""
    number = int(host.rpartition(".")[2])
    if path == "/robots.txt":
        time.sleep(0.1)  # until several requests wait for it
        return ROBOTS[number]
    if path in POLICIES:
        return http(b"User-Agent: *", "200 OK", "text/plain") if number == 1 else NOT_FOUND
    if number > 1:
        return OTHER_PATHS.get(path) or http(b"<a href='/secret'>s</a><a href='/b'>b</a>")
    name, _, rest = path[1:].partition("/")
    match name:
        case "":
            links = "".join(f"<a href='{link}'>x</a>" for link in INDEX)
            hosts = "".join(f"<a href='http://127.0.0.{n}:PORT/'>x</a>" for n in ROBOTS)
            port = headers["host"].rpartition(":")[2]
            text = (
                links + hosts.replace("PORT", port) + BAD_LINKS + "<a rel=nofollow href='/hidden'>"
            )
            return http(text.encode(), "200 OK", "text/html", "Set-Cookie: a=b")
        case "loop":
            return http(b"", "302 Found", None, "Location: /loop")
        case "to":
            return http(b"", "301 Moved Permanently", None, f"Location: /to/{3 - int(rest)}")
        case "chain":
            return http(b"", "307 Temporary Redirect", None, f"Location: /chain/{int(rest) + 1}")
        case "endless":
            return stream("text/html", b"x" * 10_000)
        case "drip":
            return stream("text/html", b"x", 0.05)
        case "picture":
            return stream("image/png", b"x" * 10_000)
        case "charset":
            return http(WRONG_CHARSET, "200 OK", "text/html; charset=utf-8")
        case "503":
            return http(b"", "503 Service Unavailable", "text/html", "Retry-After: 0")
        case "bomb":
            return http(BOMB, "200 OK", "text/html", "Content-Encoding: gzip")
        case "headers":
            return http(b"x", "200 OK", "text/html", *(f"X-{i}: {'x' * 900}" for i in range(100)))
        case "header":
            return http(b"x", "200 OK", "text/html", "X-Long: " + "x" * 100_000)
        case "long":
            return http(b"").replace(b": 0", b": 1000") + b"short"
        case "short":
            return http(b"12345").replace(b"12345", b"12345<p>and more")
        case "reset":
            return [http(bytes(500))[:100], RESET]
        case "garbage":
            return b"SSH-2.0-OpenSSH_9.2\r\n\r\n"
        case "typeless":
            return http(b"text", "200 OK", None)
        case "away":
            return http(b"", "302 Found", None, "Location: http://localhost:1/")
        case "to-file":
            return http(b"", "302 Found", None, "Location: file:///etc/hostname")
        case "empty":
            return http(b"")
        case "nul":
            return http(b"\0\0<a href='/n\0'>\0</a>\xff\xfe")
        case "meta":
            return http(
                b"<META NAME=Robots CONTENT='noindex,NoFollow'><a href='/hidden-meta'>x</a>"
            )
        case "header-nofollow":
            return http(b"<a href='/hidden2'>x</a>", "200 OK", "text/html", "X-Robots-Tag: none")
        case "calendar":
            return http(f"<a href='/calendar/{int(rest) + 1}'>next</a>".encode())
        case "deep":
            return http(b"<div>" * 100_000 + b"<a href='/below'>x</a>")
        case "401" | "304":
            return http(b"", f"{name} Status", "text/html")
        case "text":
            return http(b"text <a href='/no-link'>", "200 OK", "Text/Plain; charset=x")
        case "xhtml":
            return http(
                b"<html xmlns='http://www.w3.org/1999/xhtml'/>", "200 OK", "application/xhtml+xml"
            )
        case "encoding":
            return http(b"text", "200 OK", "text/html", "Content-Encoding: x-unknown")
        case "status":
            return http(b"text").replace(b"200 OK", b"299 Other")
    return http(b"<p>text")


def robots(text, status="200 OK", *headers):
    return http(text, status, "text/plain", *headers)


RULES = b"User-agent: *\nDisallow: /private\nDisallow: /secret\n"
ROBOTS = {
    1: robots(RULES),
    2: robots(b"", "500 Internal Server Error"),
    3: http(b"<!DOCTYPE html><html><body>Not here. Disallow: / </body></html>"),
    4: [robots(bytes(10))[:-10]],  # and no byte of the body
    5: robots(RULES + b"# long\n" * 100_000 + b"Disallow: /\n"),
    6: robots(RULES, "404 Not Found"),
    7: robots(b"", "301 Moved Permanently", "Location: /rules.txt"),
    8: robots(RULES + b"License: /l.xml\nlicense: http://127.0.0.9:1/x.xml\nCrawl-delay: 0.4\n"),
    9: robots(b"", "429 Too Many Requests"),
}
OTHER_PATHS = {
    "/rules.txt": robots(RULES),
    "/l.xml": http(b"<rsl/>", "200 OK", LICENCE),
    "/m.xml": http(b"<rsl/>", "404 Not Found", LICENCE),
    "/b": http(
        f"<link rel=license type='{LICENCE}' href=/n.xml><link rel=license href=/o.xml>".encode(),
        "200 OK", "text/html",
        f'Link: </m.xml>; rel="license"; type="{LICENCE}", </p.xml>; rel=next',
    ),
    "/n.xml": http(b"<rsl/>", "200 OK", LICENCE),
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile_crawl(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "out"
    with web_site(hostile) as site:
        domains = ",".join(f"127.0.0.{n}" for n in ROBOTS)
        run(
            out, site.url(), "--domains", domains, "--timeout", 2, "--max-page-bytes", 1_000_000,
            "--depth", 6,
        )  # fmt: skip
    return site, out


def stored_at(out, number):
    """Return {path: (status, body)} of what is stored of the site 127.0.0.number."""
    pattern = rf"http://127\.0\.0\.{number}:\d+(/.*)"
    rows = (
        (re.fullmatch(pattern, url), status, body) for url, status, _, _, body in responses(out)
    )
    return {match[1]: (status, body) for match, status, body in rows if match}


def test_bad_pages_are_left_out_and_counted(hostile_crawl):
    _, out = hostile_crawl
    stored = stored_at(out, 1)
    assert set(stored) - set(POLICIES) == {
        "/", "/charset", "/f%EF%BF%BDr", "/short", "/q?b=2&a=1", "/meta", "/header-nofollow",
        *(f"/calendar/{n}" for n in range(1, 7)), "/deep", "/text", "/xhtml", "/empty",
        "/nul", "/n",
    }  # fmt: skip
    assert stored["/charset"] == (200, WRONG_CHARSET) and stored["/short"] == (200, b"12345")
    counts = summary(out)
    assert counts["end"] == "finished" and is_whole(out)
    refused, errors = counts["refused"], counts["errors"]
    assert {kind: refused[kind] for kind in refused if "robots" not in kind} == {
        "nofollow": 1, "links of a nofollow page": 2, "too large": 2, "headers too large": 1,
        "type missing": 1, "type image/png": 1, "unknown encoding": 1, "too many redirects": 1,
        "redirect to another domain": 1, "link to another domain": 2,
    }  # fmt: skip
    assert {kind: errors[kind] for kind in errors if "robots" not in kind} == {
        "status 302": 1, "status 401": 1, "status 304": 1, "status 299": 1, "status 503": 1,
        "DownloadTimeoutError": 1, "DownloadFailedError": 2, "ResponseDataLossError": 2,
    }  # fmt: skip


def test_each_url_is_requested_once_and_a_failure_three_times(hostile_crawl):
    site, _ = hostile_crawl
    asked = Counter(site.paths())
    retried = {"/drip", "/503", "/header", "/long", "/reset", "/garbage"}
    assert {path for path, n in asked.items() if n > 1} == retried
    assert {asked[path] for path in retried} == {3}
    assert asked["/chain/6"] == 1 and not asked["/chain/7"]
    assert asked["/to/1"] == asked["/to/2"] == asked["/loop"] == 1
    assert not {"/hidden", "/hidden-meta", "/hidden2", "/no-link", "/calendar/7"} & set(asked)


def test_no_cookies_and_no_more_bytes_than_needed(hostile_crawl):
    site, _ = hostile_crawl
    assert not [path for _, path, headers, _ in site.requests if "cookie" in headers]
    assert not [path for _, path, headers, _ in site.requests if "referer" in headers]
    # sockets hold some megabytes
    assert 10_000 <= site.sent["/picture"] < 8e6 and site.sent["/endless"] < 12e6


def test_robots_txt_is_read_as_rfc_9309_says(hostile_crawl):
    """And stored as it was received. What cannot be read forbids everything."""
    site, out = hostile_crawl
    assert "/private" not in site.paths()
    for number in (2, 4, 9):
        assert set(site.paths(f"127.0.0.{number}")) == {"/robots.txt"}
    assert stored_at(out, 2) == {"/robots.txt": (500, b"")}
    assert stored_at(out, 4) == {} and stored_at(out, 9) == {"/robots.txt": (429, b"")}
    for number in (3, 6):  # an error page has no rules, and neither has status 404
        assert "/secret" in site.paths(f"127.0.0.{number}")
    for number in (5, 7, 8):
        paths = site.paths(f"127.0.0.{number}")
        assert "/b" in paths and "/secret" not in paths
    body = ROBOTS[5].partition(b"\r\n\r\n")[2]
    _, cut = stored_at(out, 5)["/robots.txt"]
    assert cut == body[: 512 << 10] != body
    rules = (200, RULES)
    assert stored_at(out, 7)["/robots.txt"] == stored_at(out, 7)["/rules.txt"] == rules
    refused, errors = summary(out)["refused"], summary(out)["errors"]
    assert refused["robots.txt"] == 3 + 1 + 1 + 3 and refused["policy file: robots.txt"] == 13
    assert errors["robots.txt: status 500"] == errors["robots.txt: status 429"] == 1


def test_the_delay_that_a_site_asks_for(hostile_crawl):
    site, _ = hostile_crawl
    times = [at for host, path, _, at in site.requests if host == "127.0.0.8"]
    # the first gap, after robots.txt, is shorter: the delay is not known before. A request may
    # reach the server late, but not each of them
    assert len(times) > 5 and times[-1] - times[1] > 0.8 * 0.4 * (len(times) - 2)


def test_policy_files_are_stored_with_any_status(hostile_crawl):
    """Every site has its policy files, and licences that robots.txt, headers and pages name."""
    site, out = hostile_crawl
    assert {path: stored_at(out, 1)[path] for path in POLICIES} == {
        "/robots.txt": (200, RULES),
        "/ai.txt": (200, b"User-Agent: *"),
        "/.well-known/ai.txt": (200, b"User-Agent: *"),
        "/.well-known/tdmrep.json": (200, b"User-Agent: *"),
    }
    stored = stored_at(out, 8)
    assert stored["/ai.txt"] == stored["/.well-known/tdmrep.json"] == (404, b"no")
    assert stored["/l.xml"] == stored["/n.xml"] == (200, b"<rsl/>")
    assert stored["/m.xml"] == (404, b"<rsl/>")
    assert not {"/o.xml", "/p.xml", "/x.xml"} & {path for _, path, _, _ in site.requests}


# ---- folders from strangers


class RunsCode:
    """A pickle that makes a folder when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_pickle_of_the_folder_is_read(tmp_path):
    """Neither in a new folder, nor in one whose crawl was stopped; the crawl then continues."""
    data = pickle.dumps(RunsCode(tmp_path / "pwned"))
    out = tmp_path / "out"
    plant(out, data)
    with web_site(tree(40, 0.02)) as site:
        process = start(out, site, 12)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        assert (out / ".job" / "queue.jsonl").stat().st_size
        plant(out, data)
        run(out, site.url())
        downloads = Counter(path for path in site.paths() if path not in POLICIES)
    assert not (tmp_path / "pwned").exists()
    assert pages(out) == Counter(f"/{n or ''}" for n in range(40))
    assert max(downloads.values()) == 1
    with pytest.raises(FileExistsError):  # the pickle does work
        (tmp_path / "pwned").mkdir()
        pickle.loads(data)


def plant(out, data):
    """Write a pickle, as it is and as a queue of Scrapy has it, wherever Scrapy reads some."""
    folder = out / ".job" / "scrapy"
    queue = folder / "requests.queue" / "0"
    queue.mkdir(parents=True, exist_ok=True)
    (folder / "spider.state").write_bytes(data)
    (queue / "q00000").write_bytes(len(data).to_bytes(4, "big") + data)
    info = {"chunksize": 100_000, "size": 1, "tail": [0, 0, 0], "head": [0, 1]}
    (queue / "info.json").write_text(json.dumps(info))
    (folder / "requests.queue" / "active.json").write_text("[0]")


def queued(url, policy=False, priority=0, **meta):
    return json.dumps({"url": url, "policy": policy, "priority": priority, "meta": meta})


def test_lines_of_the_queue_that_are_no_requests_are_left_out(tmp_path):
    """A queue from elsewhere decides which pages of the crawl come first, and nothing else."""
    with web_site(tree(40, 0.02)) as site:
        process = start(tmp_path, site, 12)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        queue = tmp_path / ".job" / "queue.jsonl"
        count = len(queue.read_text().splitlines())
        bad = [
            queued("file:///etc/passwd"), queued(site.url("/", "127.0.0.2")), queued("/3"),
            queued(site.url("/x", "127.0.0.2"), policy=True), queued(site.url(), priority="0"),
            queued(site.url(), priority=1 << 60), "[]", "1", "null", '{"url": 1}', "[" * 60_000,
            "{", queued(site.url("/bad"), redirect_urls=[1]), "x" * 60_000,
            json.dumps({"url": site.url(), "policy": False, "priority": 0, "meta": []}),
        ]  # fmt: skip
        queue.write_text(queue.read_text() + "\n".join(bad) + "\n" + queued(site.url("/39"))[:-9])
        before = len(site.requests)
        run(tmp_path, site.url())
        hosts = {host for host, *_ in site.requests}
        paths = [path for _, path, *_ in site.requests[before:] if path != "/robots.txt"]
    assert count and hosts == {"127.0.0.1"}
    assert set(paths) <= {f"/{n}" for n in range(40)} | {"/bad"}
    refused = summary(tmp_path)["refused"]
    assert refused["line of the queue that is no request"] >= len(bad) - 1
    assert pages(tmp_path) == Counter(f"/{n or ''}" for n in range(40))


# ---- a site that uses the crawler


def test_a_robots_txt_does_not_lead_into_the_own_network(tmp_path):
    """The seeds' hosts alone may have private addresses."""

    def handler(host, path, headers):
        port = headers["host"].rpartition(":")[2]
        if path == "/robots.txt" and host != "127.0.0.3":
            scheme = {"127.0.0.1": "http", "127.0.0.2": "https"}[host]
            return http(b"", "302 Found", None, f"Location: {scheme}://127.0.0.3:{port}/inside")
        return http(b"secret" if path == "/inside" else b"<p>text", "200 OK", "text/html")

    with web_site(handler) as site:
        run(tmp_path, site.url(), site.url("/", "127.0.0.2"), status=2)
    assert {host for host, *_ in site.requests} == {"127.0.0.1", "127.0.0.2"}
    errors = summary(tmp_path)["errors"]
    assert errors["robots.txt: PrivateAddressError"] == 1 and errors["robots.txt: IgnoreRequest"]
    assert not any(b"secret" in body for *_, body in responses(tmp_path))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True), ("2606:2800:21f::1", True), ("::ffff:93.184.215.14", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("169.254.169.254", False), ("0.0.0.0", False),
        ("100.64.0.1", False), ("192.168.1.1", False), ("224.0.0.1", False), ("::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:169.254.169.254", False), ("fd00::1", False),
        ("fe80::1%eth0", False), ("2002:7f00:1::", False), ("64:ff9b::a00:1", False), ("::", False),
    ],
)  # fmt: skip
def test_public_addresses(address, expected):
    from fastlm.data.crawl_network import is_public

    assert is_public(address) is expected


def test_endless_headers_end_an_answer(tmp_path):
    """At 256 KiB, also where they are those of answers without an end; asked for once."""

    def endless(line):
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
        for _ in range(20_000):
            yield line

    def handler(host, path, headers):
        if path == "/":
            links = "".join(f"<a href='/{name}'>x</a>" for name in ("lines", "continues", "fine"))
            return http(links.encode())
        if path == "/lines":
            return endless(b"X: " + b"y" * 4000 + b"\r\n")
        if path == "/continues":
            return [b"HTTP/1.1 100 Continue\r\n\r\n"] * 200_000
        return NOT_FOUND if path in POLICIES else http(b"<p>text")

    with web_site(handler) as site:
        run(tmp_path, site.url(), "--timeout", 30)
    assert pages(tmp_path) == Counter(["/", "/fine"])
    assert summary(tmp_path)["refused"]["too large"] == 2
    assert max(site.sent.values()) < 8 << 20  # what the kernel's buffers hold
    assert max(Counter(site.paths()).values()) == 1


def test_a_crawl_that_ends_does_not_wait_for_a_slow_site(tmp_path):
    """What waits for its time returns to the queue, and nothing counts as refused."""

    def handler(host, path, headers):
        if path == "/robots.txt":
            return robots(b"User-agent: *\nCrawl-delay: 60\n")
        return tree(9)(host, path, headers)

    with web_site(handler) as site:
        begin = time.monotonic()
        run(tmp_path, site.url(), "--max-seconds", 2)
        assert time.monotonic() - begin < 50  # a second request would come after 60 s
    stored = summary(tmp_path)
    assert stored["end"] == "max_seconds" and not stored["refused"] and not stored["errors"]
    lines = (tmp_path / ".job" / "queue.jsonl").read_text().splitlines()
    urls = {json.loads(line)["url"] for line in lines}
    assert {site.url(path) for path in ("/", *POLICIES[1:])} == urls
