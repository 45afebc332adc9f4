"""Crawl web sites politely into WARC files: the options, the folder and the end of a crawl.

Scrapy crawls (extra ``fastlm[crawl]``); `fastlm.data.crawl_spider` has the spider and its
middlewares. The folder of a crawl:

    crawl-00000.warc.gz  pages, and the policy files of their sites, each with date and headers
    crawl.log            Scrapy's log
    crawl.json           options, versions and counts, written at the end of every run
    .job/                what an unfinished crawl continues from

A stopped crawl (Ctrl-C, a bound) continues from the queue that it wrote at its end
(`fastlm.data.crawl_queue`). A killed crawl wrote none: it starts at the seeds again, but takes the
pages it has from its WARC files and only downloads what is missing.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastlm.data.crawl_options import CrawlOptions
from fastlm.data.warc_files import warc_date, warc_paths
from fastlm.errors import InputError
from fastlm.files import (
    make_folder,
    read_json,
    read_text,
    remove,
    try_lock,
    write_error,
    write_json,
)
from fastlm.progress import Track, silent

if TYPE_CHECKING:
    from fastlm.data.crawl_archive import Archive

INSTALL = "pip install 'fastlm[crawl]'"
MAX_SEED_BYTES = 1 << 26  # of a file of seeds: a million addresses
PACKAGES = ("fastlm", "scrapy", "twisted", "protego", "fastwarc")  # whose versions are stored
# Reasons of Scrapy for the end of a crawl -> ours
ENDS = {"shutdown": "interrupted", "closespider_timeout": "max_seconds"}


def read_seeds(seeds: tuple[str, ...]) -> list[str]:
    """Return the URLs of seeds, which are URLs or files with one URL a line. Empty lines and lines
    that start with # are skipped. InputError: no URL, or not a URL of http or https.
    """
    urls = []
    for seed in seeds:
        if re.match(r"[a-z][a-z0-9+.-]*://", seed, re.IGNORECASE):
            urls.append(_check_url(seed, "seeds"))
            continue
        if not Path(seed).is_file():
            raise InputError(
                f"seeds: expected a URL with https:// or a file of URLs, got {seed!r:.200}"
            )
        for number, line in enumerate(read_text(seed, MAX_SEED_BYTES).splitlines(), 1):
            if (url := line.strip()) and not url.startswith("#"):
                urls.append(_check_url(url, f"{seed}:{number}"))
    if not urls:
        raise InputError("seeds: expected at least one URL, got none")
    return list(dict.fromkeys(urls))


def _check_url(url: str, location: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    except ValueError:
        pass
    raise InputError(f"{location}: expected a URL of http or https, got {url!r:.200}")


def crawl(options: CrawlOptions, track: Track = silent) -> dict[str, Any]:
    """Crawl, or continue the crawl in the folder, and return what crawl.json then contains.

    Twisted's event loop runs once in a process, and so does this function. SIGINT and SIGTERM end
    the crawl after the downloads under way. InputError: options, a folder of another or a finished
    crawl, a missing extra, no space on the disk.
    """
    options.check()
    seeds = read_seeds(options.seeds)
    _check_scrapy()
    from fastlm.data.crawl_archive import Archive

    make_folder(options.out)
    with _lock(options.out):
        job = options.out / ".job"
        _check_job(job, options, seeds)
        archive = Archive(options, track)
        previous_run = _begin_job(job, options, seeds)
        began = warc_date(datetime.now(UTC))
        _run(archive, options, seeds, job)
        if archive.failure is not None:
            raise write_error(options.out, archive.failure)
        if not archive.end:  # the second Ctrl-C
            raise KeyboardInterrupt
        end = ENDS.get(archive.end, archive.end)
        summary = {
            "end": end,
            "began": previous_run.get("began", began),
            "ended": warc_date(datetime.now(UTC)),
            **archive.counts(previous_run),
            "files": {path.name: path.stat().st_size for path in warc_paths(options.out)},
            "options": {**asdict(options), "seeds": seeds},
            "user_agent": options.user_agent,
            "versions": {name: version(name) for name in PACKAGES} | {"python": python_version()},
        }
        write_json(options.out / "crawl.json", summary)
        (job / "running").unlink()
        if end == "finished":
            remove(job)
    return summary


def _run(archive: "Archive", options: CrawlOptions, seeds: list[str], job: Path) -> None:
    """Run Scrapy until the crawl ends."""
    from scrapy.crawler import CrawlerProcess

    from fastlm.data import crawl_spider

    domains = crawl_spider.domains_of(options, seeds)
    process = CrawlerProcess(crawl_spider.settings(options, len(domains), job))
    process.crawl(
        crawl_spider.PageSpider, options=options, seeds=seeds, archive=archive,
        queue_path=job / "queue.jsonl",
    )  # fmt: skip
    process.start()
    archive.close()


def _check_scrapy() -> None:
    """Raise InputError unless Scrapy is installed and its event loop has not run."""
    try:
        import scrapy  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"crawl: expected the package {error.name}, which is not installed ({INSTALL})"
        ) from None
    if "twisted.internet.reactor" in sys.modules:
        raise InputError("crawl: expected one crawl in a process, got another one")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Context: be the only crawl in ``folder``. The lock ends with the process."""
    make_folder(folder / ".job")
    with open(folder / ".job" / "lock", "w") as file:
        try_lock(file, f"out: expected a folder without a running crawl, got {folder}")
        yield


def _check_job(job: Path, options: CrawlOptions, seeds: list[str]) -> None:
    """Refuse a folder that has another crawl, a finished one, or WARC files from elsewhere.
    InputError names the option.
    """
    if (job / "scope.json").exists():
        stored = read_json(job / "scope.json")
        for key, value in _scope(options, seeds).items():
            if stored.get(key) != value:
                raise InputError(
                    f"{key}: expected the value of the crawl in {options.out}, "
                    f"{stored.get(key)!r:.80}, got {value!r:.80}"
                )
    elif warc_paths(options.out):
        remove(job)
        raise InputError(
            f"out: expected an empty folder or an unfinished crawl, got {options.out} "
            f"(for changes since a finished crawl: --previous {options.out} -o ANOTHER)"
        )


def _begin_job(job: Path, options: CrawlOptions, seeds: list[str]) -> dict[str, Any]:
    """Mark the crawl as running, and return crawl.json of the run that it continues. A killed run
    wrote none, nor a queue, and its successor meets the same refusals and errors again.

    Scrapy's folder has pickles, which run code: nothing in it is read but the fingerprints of the
    requests so far, which are bytes.
    """
    write_json(job / "scope.json", _scope(options, seeds))
    scrapy, seen = job / "scrapy", job / "scrapy" / "requests.seen"
    continues = (job / "queue.jsonl").is_file() and not (job / "running").exists()
    if continues and seen.is_file() and not seen.is_symlink() and not scrapy.is_symlink():
        for path in scrapy.iterdir():
            if path != seen:
                remove(path)
    else:
        continues = False
        remove(scrapy)
        remove(job / "queue.jsonl")
    (job / "running").touch()
    with contextlib.suppress(InputError):
        return read_json(options.out / "crawl.json") if continues else {}
    return {}


def _scope(options: CrawlOptions, seeds: list[str]) -> dict[str, Any]:
    """Return what decides which pages belong to a crawl."""
    return {
        "seeds": sorted(seeds),
        "domains": sorted(options.domains),
        "depth": options.depth,
        "previous": options.previous and str(options.previous.absolute()),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return one line for the user: the result of `crawl`."""
    from fastlm.pipeline.text import size_text

    kinds = Counter(summary["refused"]) + Counter(summary["errors"])
    counts = ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common(8))
    unchanged = f", {n:,} unchanged" if (n := summary.get("unchanged", 0)) else ""
    text = f"{summary['pages']:,} pages ({size_text(summary['bytes'])}{unchanged}), "
    text += f"{summary['policies']:,} policy files; {counts or 'nothing'} left out"
    if summary["end"] != "finished":
        text += f". Stopped ({summary['end']}): the same command continues"
    return text
