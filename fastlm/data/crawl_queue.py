"""The queue of a crawl, in JSON: what a stopped crawl continues from.

Scrapy's own queue and its state of a spider are pickles, which run code when they are read. Here a
request is a line of JSON, and what it may say is checked: a folder from elsewhere decides at most
which pages of the crawl's own domains are asked for first.

    .job/queue.jsonl            the requests that a stopped crawl has not sent
    .job/scrapy/requests.seen   Scrapy's fingerprints of the requests so far, which are bytes
    .job/scrapy/requests.queue  the queue of the running crawl, which no other crawl reads
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from queuelib import FifoDiskQueue
from scrapy import Request
from scrapy.core.scheduler import Scheduler
from scrapy.crawler import Crawler
from scrapy.dupefilters import RFPDupeFilter

from fastlm.errors import InputError
from fastlm.files import atomic_path

MAX_LINE = 1 << 16  # bytes of a request: Scrapy accepts addresses of 8 KiB
MAX_PRIORITY = 1 << 30
FROM_QUEUE = "from_queue"  # key of a request's meta: it was seen when it entered the queue
# What a request's meta keeps in the queue; middlewares set the rest again
META = {"depth": int, "retry_times": int, "redirect_times": int, "redirect_ttl": int}


def line_of(request: Request, spider: Any) -> bytes:
    """Return a request of the spider as JSON."""
    meta = {key: request.meta[key] for key in META if key in request.meta}
    if urls := request.meta.get("redirect_urls"):
        meta["redirect_urls"] = urls
    is_policy = request.callback == spider.parse_policy
    row = {"url": request.url, "policy": is_policy, "priority": request.priority, "meta": meta}
    return json.dumps(row).encode()


def request_of(line: bytes, spider: Any) -> Request | None:
    """Return the request of a line; None if the line is cut, or is no request of this crawl."""
    try:
        row = json.loads(line)
        url, is_policy, priority, meta = (row[k] for k in ("url", "policy", "priority", "meta"))
        if not isinstance(url, str) or type(priority) is not int or abs(priority) > MAX_PRIORITY:
            return None
        values = {k: meta[k] for k, kind in META.items() if type(meta.get(k)) is kind}
        first = meta.get("redirect_urls") or []
        if isinstance(first, list) and all(isinstance(u, str) for u in first):
            values["redirect_urls"] = first
        request = spider.request(url, is_policy is True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if request is not None:
        request.meta.update(values)
        request.priority = priority
    return request


class JsonQueue:
    """Scrapy's queue on disk, with requests as JSON."""

    def __init__(self, spider: Any, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.spider, self.queue = spider, FifoDiskQueue(path)

    @classmethod
    def from_crawler(cls, crawler: Crawler, key: str) -> "JsonQueue":
        return cls(crawler.spider, key)

    def push(self, request: Request) -> None:
        self.queue.push(line_of(request, self.spider))

    def pop(self) -> Request | None:
        line = self.queue.pop()
        return request_of(line, self.spider) if line else None

    def peek(self) -> Request | None:
        line = self.queue.peek()
        return request_of(line, self.spider) if line else None

    def __len__(self) -> int:
        return len(self.queue)

    def close(self) -> None:
        self.queue.close()


class SeenRequests(RFPDupeFilter):
    """Scrapy's filter of duplicates, which lets the requests of the queue pass once."""

    def request_seen(self, request: Request) -> bool:
        return not request.meta.pop(FROM_QUEUE, False) and super().request_seen(request)


class CrawlScheduler(Scheduler):
    """Scrapy's scheduler, which begins with the requests of ``.job/queue.jsonl`` and writes those
    that remain to it.
    """

    def open(self, spider: Any) -> Any:
        opened = super().open(spider)
        for request in read_queue(spider.queue_path, spider):
            request.meta[FROM_QUEUE] = True
            self.enqueue_request(request)
        return opened

    def close(self, reason: str) -> Any:
        spider: Any = self.spider
        try:
            with atomic_path(spider.queue_path) as path, open(path, "wb") as file:
                while request := self.next_request():
                    file.write(line_of(request, spider) + b"\n")
        except InputError as error:  # its traceback would keep the spider until Python ends
            cause = OSError(*error.__cause__.args[:2]) if error.__cause__ else OSError(str(error))
            spider.archive.failure = spider.archive.failure or cause
        return super().close(reason)


def read_queue(path: Path, spider: Any) -> Iterator[Request]:
    """Yield the requests of a queue. Lines that are none are counted and left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE):
            if request := request_of(line, spider):
                yield request
            else:
                spider.archive.refused["line of the queue that is no request"] += 1
