"""What a crawl has stored, and what it left out and why.

The spider and its middlewares share one `Archive`. Responses are Scrapy's; only here do they become
records.
"""

import http
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scrapy.http import Response
from w3lib.url import canonicalize_url

from fastlm.data.crawl_options import CrawlOptions
from fastlm.data.warc_files import PageIndex, StoredPage, WarcWriter, warc_paths
from fastlm.errors import InputError
from fastlm.progress import Track
from fastlm.sources.warc import MAX_POLICY_BYTES

ENCODING = "content_encoding"  # key of a request's meta: how its response was compressed


class Archive:
    """The WARC files of a crawl, an index of its pages and of an earlier crawl's, and counts.

    ``failure``: the error of the disk that ends the crawl. ``end``: why Scrapy closed the spider,
    "" while it runs.
    """

    def __init__(self, options: CrawlOptions, track: Track) -> None:
        self.options = options
        self.refused: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.policies = self.unchanged = 0
        self.failure: OSError | None = None
        self.end = ""
        self.previous = PageIndex(canonicalize_url)
        for _ in self.previous.read(_previous_paths(options.previous)):
            pass
        info = {
            "software": options.user_agent,
            "format": "WARC File Format 1.1",
            "http-header-user-agent": options.user_agent,
            "robots": "obey",
        }
        try:
            self.writer = WarcWriter(options.out, info)
        except OSError as error:
            raise InputError(f"{options.out}: expected a writable folder, got: {error}") from error
        self.stored = PageIndex(canonicalize_url)  # by earlier runs of this crawl
        self.bytes = sum(len(page.body) for page in self.stored.read(warc_paths(options.out)))
        self.pages = len(self.stored)
        self._progress = iter(
            track(range(self.pages, options.max_pages), "crawl", options.max_pages, "pages")
        )

    @property
    def full(self) -> str:
        """The bound that the crawl has reached, "" if none."""
        if self.failure is not None:
            return "failure"
        if self.pages >= self.options.max_pages:
            return "max_pages"
        return "max_bytes" if self.bytes >= self.options.max_bytes else ""

    def write_page(self, response: Response) -> None:
        """Store a page. A page of the earlier crawl that the server confirmed is stored again, with
        today's date, so that every crawl is complete by itself.
        """
        fields = {}
        if page := response.meta.get("unchanged_since"):
            fields = {"WARC-Refers-To": page["record_id"], "WARC-Refers-To-Date": page["date"]}
        if self._write(response.url, response, fields):
            self.unchanged += bool(fields)
            self.pages += 1
            self.bytes += len(response.body)
            next(self._progress, None)

    def write_policy(self, response: Response) -> None:
        """Store a policy file, whatever its status. After redirects it is the policy file of the
        first address, too (RFC 9309, 2.3.1.2).
        """
        first, *_ = response.meta.get("redirect_urls") or [response.url]
        fields = {}
        if len(response.body) > MAX_POLICY_BYTES:
            fields = {"WARC-Truncated": "length"}
            response = response.replace(body=response.body[:MAX_POLICY_BYTES])
        for url in dict.fromkeys((first, response.url)):
            self.policies += self._write(url, response, fields)

    def _write(self, url: str, response: Response, fields: Mapping[str, str]) -> bool:
        """Write a record, and return whether that was possible."""
        headers = [(key, v) for key, values in response.headers.items() for v in values]
        encoding = response.meta.get(ENCODING)
        if encoding and "Content-Encoding" not in response.headers:
            headers.append((b"Content-Encoding", encoding))
        if response.ip_address:
            fields = {**fields, "WARC-IP-Address": str(response.ip_address)}
        try:
            phrase = http.HTTPStatus(response.status).phrase
        except ValueError:
            phrase = ""
        status_line = f"{response.protocol or 'HTTP/1.1'} {response.status} {phrase}"
        try:
            self.writer.write(url, datetime.now(UTC), status_line, headers, response.body, fields)
        except InputError:
            self.refused["headers too large"] += 1
            return False
        except OSError as error:
            self.failure = self.failure or error
            return False
        return True

    def close(self) -> None:
        """Complete the current file. After a failure it stays unfinished: the next run cuts it."""
        try:
            if self.failure is None:
                self.writer.close()
        except OSError as error:
            self.failure = error

    def counts(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the counts of this run and of ``before``, the earlier run that it continues."""
        return {
            "pages": self.pages,
            "bytes": self.bytes,
            "policies": self.policies + before.get("policies", 0),
            "unchanged": self.unchanged + before.get("unchanged", 0),
            "refused": dict(self.refused + Counter(before.get("refused", {}))),
            "errors": dict(self.errors + Counter(before.get("errors", {}))),
        }


def meta_of(page: StoredPage) -> dict[str, str]:
    """Return what the record of a page that is confirmed as unchanged says about the old one."""
    return {"record_id": page.record_id, "date": page.date}


def _previous_paths(previous: Path | None) -> list[Path]:
    """Return the WARC files of an earlier crawl, or of another crawler. InputError: none."""
    if previous is None:
        return []
    paths = [previous]
    if previous.is_dir():
        paths = sorted(
            path for pattern in ("*.warc.gz", "*.warc") for path in previous.glob(pattern)
        )
    if not paths or not previous.exists():
        raise InputError(f"previous: expected a folder with WARC files or one, got {previous}")
    return paths
