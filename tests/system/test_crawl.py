"""`fastlm data crawl` against servers that misbehave: what is stored, what is left out, and that a
crawl that is killed or stopped continues with what is missing.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType
from warcio.checker import Checker
from web_site import RESET, http, web_site

from fastlm.data.crawl import CrawlOptions, crawl, read_seeds
from fastlm.errors import InputError

pytest.importorskip("scrapy")

PLAIN = {**os.environ, "no_proxy": "*", "OMP_NUM_THREADS": "1"}
POLICIES = ("/robots.txt", "/ai.txt", "/.well-known/tdmrep.json")
NOT_FOUND = http(b"no", "404 Not Found")


def command(out, *arguments):
    words = ["data", "crawl", "-o", out, "--contact", "test@example.org", "--delay", 0, *arguments]
    return [sys.executable, "-m", "fastlm", *map(str, words)]


def run(out, *arguments, status=0):
    result = subprocess.run(
        command(out, *arguments), env=PLAIN, capture_output=True, text=True, timeout=60
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
        body = f"<title>{n}</title>{links}".encode()
        return http(body, "200 OK", "text/html", f'ETag: "v{n}"', "X-Day: first")

    return handler


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "stop"])
def test_a_crawl_that_ended_early_continues(tmp_path, number):
    """Every page is stored once, and the pages that were there are not downloaded again."""
    count, out = 60, tmp_path / "out"
    names = [f"/{n or ''}" for n in range(count)]
    with web_site(tree(count, 0.01)) as site:
        for served in (15, 35):
            process = subprocess.Popen(
                command(out, site.url()), env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            wait_for(lambda: len(site.requests) > served)  # noqa: B023
            process.send_signal(number)
            output, _ = process.communicate(timeout=30)
            assert process.returncode == (-9 if number == signal.SIGKILL else 0)
            if number == signal.SIGINT:
                assert summary(out)["end"] == "interrupted" and is_whole(out)
                assert b"Stopped (interrupted): the same command continues" in output
        part = next(out.glob("*.part"), None)
        assert (part is not None) == (number == signal.SIGKILL)
        if part:
            part.write_bytes(part.read_bytes() + b"\x1f\x8b\x08\0 cut record")
        run(out, site.url())
    assert pages(out) == Counter(names) and is_whole(out)
    assert summary(out)["end"] == "finished" and summary(out)["pages"] == count
    # one page at a time was under way at each kill
    downloads = Counter(path for path in site.paths() if path not in POLICIES)
    assert set(downloads) == set(names) and sum(downloads.values()) <= count + 2 * 2
    assert not (out / ".job").exists()
    assert "got" in run(out, site.url(), status=2).stderr
