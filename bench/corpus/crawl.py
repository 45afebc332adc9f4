"""`fastlm data crawl`: CPU time and memory of the crawler, against a server on this machine.

    python bench/corpus/crawl.py [--pages 2000]

The site is php-doc (a Debian package, fetched into the cache): real pages with their own links,
served by the standard library from another process. No delay, one request at a time, as for any
single site. CPU seconds and peak memory are those of the crawling process alone; the cost of its
start is the difference to a crawl of a tenth of the pages. The index of an earlier crawl and the
writer are measured on the pages of that crawl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from printing import print_rows

SERVER = """
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # an answer is one packet
    log_message = lambda *_: None
    def __init__(self, *arguments):
        super().__init__(*arguments, directory=sys.argv[1])
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
PACKAGE = "php-doc"
ROUNDS = 3  # the fastest counts: others use the cores


def row(bar: str, value: object, unit: str, note: str = "") -> dict:
    return {"bar": bar, "value": value, "target": None, "unit": unit, "note": note}


def crawl_cost(url: str, out: Path, pages: int) -> tuple[float, float, dict]:
    """Return CPU seconds and peak MB of a crawl, and its crawl.json."""
    words = [sys.executable, "-m", "fastlm", "data", "crawl", url, "-o", str(out)]
    words += ["--contact", "bench@example.org", "--delay", "0", "--max-pages", str(pages)]
    environment = {**os.environ, "no_proxy": "*"}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the crawl failed with status {process.returncode}")
    summary = json.loads((out / "crawl.json").read_text())
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, summary


def crawl_rows(url: str, folder: Path, pages: int) -> list[dict]:
    """Return pages per CPU second, and memory."""
    costs = {}
    for count in (pages // 10, pages):
        runs = [crawl_cost(url, folder / f"{count}-{i}", count) for i in range(ROUNDS)]
        costs[count] = min(runs, key=lambda run: run[0])
    (few, few_memory, few_pages), (all, memory, summary) = costs.values()
    rate = (summary["pages"] - few_pages["pages"]) / (all - few)
    size = summary["bytes"] / summary["pages"]
    note = f"{summary['pages']:,} pages of {size:,.0f} bytes, one site, delay 0"
    start = few - few_pages["pages"] / rate
    return [
        row("crawl", round(rate), "pages per CPU second", note),
        row("crawl: start", round(start, 2), "CPU seconds"),
        row("crawl: peak memory", round(memory), "MB", f"{few_memory:.0f} MB at a tenth of them"),
        row(
            "crawl: pages stored", summary["pages"], "pages", f"{sum(summary['errors'].values())} "
            f"errors, {summary['policies']} policy records",
        ),
    ]  # fmt: skip


def file_rows(folder: Path) -> list[dict]:
    """Return the cost of finding the pages of an earlier crawl, and of writing them again."""
    from w3lib.url import canonicalize_url

    from fastlm.data.warc_files import PageIndex, WarcWriter, read_pages, warc_paths

    paths = warc_paths(folder)
    index = PageIndex(canonicalize_url)
    reading = index.read(paths)
    for _ in range(100):  # what is imported and cached is no cost of a page
        next(reading)
    tracemalloc.start()
    for _ in reading:
        pass
    memory = tracemalloc.get_traced_memory()[0] / (len(index) - 100)
    tracemalloc.stop()
    pages = [page for path in paths for _, page in read_pages(path)]

    def read():
        for _ in PageIndex(canonicalize_url).read(paths):
            pass

    def write(out: Path):
        writer = WarcWriter(out, {"software": "bench"})
        for page in pages:
            writer.write(
                page.url, datetime.now(UTC), "HTTP/1.1 200 OK", page.headers, page.body, {}
            )
        writer.close()

    def rate(function) -> int:
        times = []
        for _ in range(ROUNDS):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return round(len(pages) / min(times))

    result = [
        row("crawl: index of an earlier crawl", rate(read), "pages per CPU second"),
        row("crawl: index, memory", round(memory), "bytes a page", f"{len(index):,} pages"),
    ]
    with tempfile.TemporaryDirectory() as out:
        rates = rate(partial(write, Path(out)))
        result.append(row("crawl: write WARC", rates, "pages per CPU second", "gzip level 6"))
    return result


def rows(pages: int = 2000) -> list[dict]:
    from fastlm.sources.packages import default_cache, fetch

    root = fetch("deb", PACKAGE, cache=default_cache())
    site = next(path.parent for path in sorted(root.rglob("index.html")))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(site)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/index.html"
        with tempfile.TemporaryDirectory() as folder:
            result = crawl_rows(url, Path(folder), pages)
            return result + file_rows(Path(folder) / f"{pages}-0")
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=2000)
    arguments = parser.parse_args()
    print_rows(rows(arguments.pages), ("scrapy", "twisted", "fastwarc"))


if __name__ == "__main__":
    main()
