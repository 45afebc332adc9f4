"""The spider of ``fastlm data crawl``, its middlewares and its settings, for Scrapy.

This module imports Scrapy: only `fastlm.data.crawl` imports it, when a crawl starts.

A site's robots.txt is read as RFC 9309 says, which Scrapy's own reading of error pages is not:
status 4xx forbids nothing, an unreachable file (5xx, 429, no answer) forbids everything, and the
first 512 KiB of a long one count. ``Crawl-delay``, which the RFC does not know, is obeyed as well.
"""

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from scrapy import Request, Spider, signals
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.robotstxt import RobotsTxtMiddleware
from scrapy.exceptions import CloseSpider, DownloadCancelledError, IgnoreRequest, StopDownload
from scrapy.http import Headers, HtmlResponse, Response
from scrapy.linkextractors import LinkExtractor
from scrapy.responsetypes import responsetypes
from scrapy.spidermiddlewares.httperror import HttpError
from twisted.internet.task import LoopingCall

from fastlm.data.crawl_archive import ENCODING, Archive, meta_of
from fastlm.data.crawl_network import BoundedHandler
from fastlm.data.crawl_options import CrawlOptions
from fastlm.data.crawl_queue import FROM_QUEUE, CrawlScheduler, JsonQueue, SeenRequests
from fastlm.data.warc_files import StoredPage, is_policy
from fastlm.sources.warc import MAX_POLICY_BYTES, PAGE_FORMATS, POLICY_PATHS

SITE_POLICIES = sorted(POLICY_PATHS - {"/robots.txt"})  # which Scrapy fetches itself
MAX_WIRE_BYTES = 64 << 20  # of a policy file, which is cut at MAX_POLICY_BYTES; bounds its bombs
MAX_LICENCES = 8  # licence files of a site
MAX_LINKS = 10_000  # of a page; the longest sitemap pages have some thousand
POLL_SECONDS = 0.5  # between two looks whether the crawl ends
MAX_DELAY = 60.0  # seconds that a site may ask for between two requests
RETRIES = 2  # Scrapy's default, stated because tests count requests
POLICY_PRIORITY = 100  # before the pages of the site, whose priority is minus their depth
POLICY = "policy"  # key of a request's meta: it fetches a policy file
FORBID_ALL = b"User-agent: *\nDisallow: /\n"
LICENCE_LINE = re.compile(rb"^[ \t]*license[ \t]*:[ \t]*(\S+)", re.IGNORECASE | re.MULTILINE)
LINK_HEADER = re.compile(r"<([^<>]{1,2000})>([^<>]{0,1000})")  # RFC 8288: <URI>; parameters
# Scrapy's messages of ignored requests -> our kinds
IGNORED = (
    ("Forbidden by robots.txt", "robots.txt"),
    ("Filtered offsite", "redirect to another domain"),
    ("max redirections", "too many redirects"),
    ("Ignored response", "too large"),
)


def settings(options: CrawlOptions, domains: int, job: Path) -> dict[str, Any]:
    """Return Scrapy's settings for a crawl of so many domains. ``job``: the folder that an
    unfinished crawl keeps.
    """
    return {
        "USER_AGENT": options.user_agent,
        "ROBOTSTXT_OBEY": True,
        "ROBOTSTXT_USER_AGENT": options.agent,
        "AUTOTHROTTLE_ENABLED": True,
        "AUTOTHROTTLE_START_DELAY": options.delay,
        "AUTOTHROTTLE_MAX_DELAY": max(MAX_DELAY, options.delay),
        "DOWNLOAD_DELAY": options.delay,
        "DOWNLOAD_DELAY_JITTER": 0.0,  # it would make half the delay possible
        # Scrapy finishes what it has begun before it ends: for one site, that is two requests
        "CONCURRENT_REQUESTS": min(options.concurrency, 2 * domains),
        "CONCURRENT_REQUESTS_PER_DOMAIN": 1,
        "DOWNLOAD_TIMEOUT": options.timeout,
        "DNS_TIMEOUT": options.timeout,
        "DOWNLOAD_MAXSIZE": options.max_page_bytes,
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_VERIFY_CERTIFICATES": True,
        "RETRY_TIMES": RETRIES,
        "REDIRECT_MAX_TIMES": 5,  # RFC 9309 asks for five
        "CLOSESPIDER_TIMEOUT": options.max_seconds or 0,
        "COOKIES_ENABLED": False,
        "REFERER_ENABLED": False,
        # a link to file://example.org/etc/passwd would be read from this machine
        "DOWNLOAD_HANDLERS": {
            **dict.fromkeys(("file", "ftp", "s3", "data")),
            **dict.fromkeys(("http", "https"), BoundedHandler),
        },
        "TELNETCONSOLE_ENABLED": False,
        "REMOTE_CONTROL_ENABLED": False,
        # breadth first: the number of links from a seed is then the smallest possible
        "DEPTH_PRIORITY": 1,
        "SCHEDULER": CrawlScheduler,
        "SCHEDULER_DISK_QUEUE": JsonQueue,
        "DUPEFILTER_CLASS": SeenRequests,
        "EXTENSIONS": {"scrapy.extensions.spiderstate.SpiderState": None},  # a pickle
        "SCHEDULER_MEMORY_QUEUE": "scrapy.squeues.FifoMemoryQueue",
        "JOBDIR": str(job / "scrapy"),
        "DOWNLOADER_MIDDLEWARES": {
            RobotsTxtMiddleware: None,
            RobotsRules: 100,
            # next to the engine: it sees final responses, decoded, after redirects and retries
            PolicyFiles: 40,
            # between redirects (600) and decoding (590): it sees bytes as received
            StoredPages: 595,
            SiteDelays: 800,
        },
        "LOG_FILE": str(options.out / "crawl.log"),
        "LOG_LEVEL": "INFO",
    }


class PageSpider(Spider):
    """Follow the links of pages from the seeds, and fetch the policy files of their sites."""

    name = "fastlm"

    def __init__(
        self, options: CrawlOptions, seeds: list[str], archive: Archive, queue_path: Path
    ) -> None:
        super().__init__()
        self.options, self.seeds, self.archive = options, seeds, archive
        self.queue_path = queue_path
        self.stopped = False  # the crawl ends: what was not sent returns to the queue
        self.allowed_domains = domains_of(options, seeds)
        self._sites: set[str] = set()  # whose policy files were requested
        self._licences: Counter[str] = Counter()
        self._links = LinkExtractor()

    @classmethod
    def from_crawler(cls, crawler: Crawler, *args: Any, **kwargs: Any) -> "PageSpider":
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.check_headers, signals.headers_received)
        crawler.signals.connect(spider.check_bytes, signals.bytes_received)
        return spider

    async def start(self) -> AsyncIterator[Request]:
        """Yield the requests for the seeds."""
        for url in self.seeds:
            for request in self._page_requests(url):
                yield request

    def check_headers(self, headers: Headers, request: Request) -> None:
        """End a download whose headers tell that it is no page."""
        if not request.meta.get(POLICY) and content_type(headers) not in PAGE_FORMATS:
            raise StopDownload(fail=False)

    def check_bytes(self, data: bytes, request: Request) -> None:
        """End the download of a policy file that is too long. What was received counts."""
        if request.meta.get(POLICY):
            size = request.meta.get("received_bytes", 0) + len(data)
            request.meta["received_bytes"] = size
            if size > MAX_POLICY_BYTES:
                raise StopDownload(fail=False)

    def parse(self, response: Response) -> Iterator[Request]:
        """Store a page and yield requests for what it links to."""
        kind = content_type(response.headers)
        if response.status != 200:
            self.archive.errors[f"status {response.status}"] += 1
        elif kind not in PAGE_FORMATS:
            self.archive.refused[f"type {kind or 'missing'}"] += 1
        elif response.headers.get("Content-Encoding"):
            self.archive.refused["unknown encoding"] += 1
        elif not is_policy(response.url):
            if not response.meta.get("stored"):
                self.archive.write_page(response)
            yield from self._requests_of(response)
        if self.archive.full:
            raise CloseSpider(self.archive.full)

    def parse_policy(self, response: Response) -> None:
        """Store a policy file."""
        self.archive.write_policy(response)

    def count_failure(self, failure: Any) -> None:
        """Count a page or a policy file that was not downloaded, by kind. A policy file is stored
        with any status.
        """
        error, is_policy_file = failure.value, failure.request.meta.get(POLICY)
        if self.stopped and isinstance(error, IgnoreRequest):
            failure.request.meta[FROM_QUEUE] = True
            self.crawler.engine.scheduler.enqueue_request(failure.request)  # type: ignore[union-attr]
            return
        prefix = "policy file: " * bool(is_policy_file)
        if isinstance(error, HttpError) and is_policy_file:
            self.archive.write_policy(error.response)
        elif isinstance(error, HttpError):
            self.archive.errors[f"status {error.response.status}"] += 1
        elif isinstance(error, DownloadCancelledError):
            self.archive.refused[f"{prefix}too large"] += 1
        elif isinstance(error, IgnoreRequest):
            kinds = (kind for message, kind in IGNORED if str(error).startswith(message))
            self.archive.refused[prefix + next(kinds, "ignored")] += 1
        else:
            self.archive.errors[prefix + type(error).__name__] += 1

    def licence_requests(self, urls: Iterable[str], base: str) -> Iterator[Request]:
        """Yield requests for licence files that a site names, at most 8. One on another domain must
        have https and no redirect: a page must not send the crawler to services of its own network.
        """
        site = urlsplit(base).netloc
        for url in urls:
            try:
                request = self.request(urljoin(base, url.strip()), is_policy=True)
            except ValueError:
                continue
            if request is None:
                self.archive.refused["licence file elsewhere"] += 1
            elif self._licences[site] < MAX_LICENCES:
                self._licences[site] += 1
                yield request

    def closed(self, reason: str) -> None:
        """Take over the counts that only Scrapy has, and note why the crawl ended."""
        # Scrapy types attributes of a crawler as optional: they are None before it starts
        for key, count in self.crawler.stats.get_stats().items():  # type: ignore[union-attr]
            if key == "offsite/filtered":
                self.archive.refused["redirect to another domain"] = count
            elif key.startswith("spider_exceptions/") and not key.endswith("/count"):
                self.archive.errors[key.rpartition("/")[2]] += count
        self.archive.end = reason

    def _requests_of(self, response: Response) -> Iterator[Request]:
        robots = b",".join(response.headers.getlist("X-Robots-Tag")).decode("latin-1")
        links = ",".join(v.decode("latin-1") for v in response.headers.getlist("Link"))
        licences = [url for url, rest in LINK_HEADER.findall(links) if is_licence_link(rest)]
        if isinstance(response, HtmlResponse):
            names = ("robots", self.options.agent.lower())
            for meta in response.css("meta[name][content]"):
                if meta.attrib["name"].strip().lower() in names:
                    robots += f",{meta.attrib['content']}"
            for link in response.css("link[rel][href]"):
                if is_licence_link(f'rel="{link.attrib["rel"]}"; type={link.attrib.get("type")}'):
                    licences.append(link.attrib["href"])
        yield from self.licence_requests(licences, response.url)
        if not isinstance(response, HtmlResponse):
            return
        if forbids_links(robots, self.options.agent):
            self.archive.refused["links of a nofollow page"] += 1
            return
        if response.meta.get("depth", 0) >= self.options.depth:
            return
        for link in islice(self._links.extract_links(response), MAX_LINKS):
            if link.nofollow:
                self.archive.refused["nofollow"] += 1
            elif not self.is_allowed(link.url):
                self.archive.refused["link to another domain"] += 1
            elif not is_policy(link.url):
                yield from self._page_requests(link.url)

    def _page_requests(self, url: str) -> Iterator[Request]:
        """Yield the request for a page, after those for the policy files of a new site."""
        site = urljoin(url, "/")
        urls = [(url, False)]
        if site not in self._sites:
            self._sites.add(site)
            urls = [(urljoin(site, path), True) for path in SITE_POLICIES] + urls
        for address, is_policy_file in urls:
            if request := self.request(address, is_policy_file):
                yield request

    def request(self, url: str, is_policy: bool) -> Request | None:
        """Return the request for a page of the crawl's domains or for a policy file, which may be
        elsewhere if it has https; None for another URL. ValueError: not a URL.
        """
        is_local = self.is_allowed(url)
        if not is_policy:
            return Request(url, self.parse, errback=self.count_failure) if is_local else None
        if not is_local and urlsplit(url).scheme != "https":
            return None
        meta = {POLICY: True, "download_maxsize": MAX_WIRE_BYTES}
        if not is_local:
            meta |= {"allow_offsite": True, "dont_redirect": True}
        return Request(
            url, self.parse_policy, errback=self.count_failure, meta=meta,
            priority=POLICY_PRIORITY,
        )  # fmt: skip

    def is_allowed(self, url: str) -> bool:
        """Return whether a URL belongs to the crawl's domains."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            return False
        host = parts.hostname or ""
        return any(host == d or host.endswith(f".{d}") for d in self.allowed_domains)


class RobotsRules(RobotsTxtMiddleware):
    """Scrapy's middleware, without its gap: where several requests wait for the robots.txt of a new
    site, Scrapy 2.19 checks only the first two and lets the others pass.
    """

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        self._rules: dict[str, Any] = {}
        crawler.signals.connect(self.robots_parsed, signals.robots_parsed)

    def robots_parsed(self, robotparser: Any, request: Request) -> None:
        self._rules[urlsplit(request.url).netloc] = robotparser

    async def robot_parser(self, request: Request) -> Any:
        await super().robot_parser(request)
        rules = self._rules.get(urlsplit(request.url).netloc)
        if rules is None:
            raise IgnoreRequest("Forbidden by robots.txt, which was not read")
        return rules


class PolicyFiles:
    """Store every robots.txt that Scrapy fetches, and pass on what RFC 9309 reads in it."""

    def __init__(self, crawler: Crawler) -> None:
        self.crawler = crawler

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "PolicyFiles":
        return cls(crawler)

    def process_request(self, request: Request) -> None:
        if is_robots_request(request):
            request.meta.setdefault(POLICY, True)
            request.meta["download_maxsize"] = MAX_WIRE_BYTES
            # that of a licence file's site, or where one redirects to; addresses of a private
            # network are refused in any case (`BoundedHandler`)
            spider: Any = self.crawler.spider
            is_local = spider.is_allowed(request.url)
            request.meta["allow_offsite"] = is_local or request.url.startswith("https:")

    def process_response(self, request: Request, response: Response) -> Response:
        if not is_robots_request(request) or "unreachable" in response.flags:
            return response
        spider: Any = self.crawler.spider
        response.request = request
        spider.archive.write_policy(response)
        if response.status == 429 or response.status >= 500:
            spider.archive.errors[f"robots.txt: status {response.status}"] += 1
            return response.replace(body=FORBID_ALL)
        if response.status != 200:
            return response.replace(body=b"")
        body = response.body[:MAX_POLICY_BYTES]
        urls = [url.decode("latin-1") for url in LICENCE_LINE.findall(body)]
        for licence in spider.licence_requests(urls, response.url):
            self.crawler.engine.crawl(licence)  # type: ignore[union-attr]
        return response.replace(body=body)

    def process_exception(self, request: Request, exception: Exception) -> Response | None:
        spider: Any = self.crawler.spider
        if not is_robots_request(request) or spider.stopped:
            return None
        spider.archive.errors[f"robots.txt: {type(exception).__name__}"] += 1
        return Response(request.url, body=FORBID_ALL, flags=["unreachable"], request=request)


class StoredPages:
    """Answer requests for pages that this crawl has stored, and ask for changes of those that an
    earlier crawl has. An unchanged page is the earlier one, with the headers of today (RFC 9111,
    4.3.4).
    """

    def __init__(self, crawler: Crawler) -> None:
        self.crawler = crawler

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "StoredPages":
        return cls(crawler)

    def process_request(self, request: Request) -> Response | None:
        if request.meta.get(POLICY):
            return None
        archive: Archive = self.crawler.spider.archive  # type: ignore[union-attr]
        if page := archive.stored.find(request.url):
            request.meta["stored"] = True
            return response_of(page, Headers(page.headers))
        if page := archive.previous.find(request.url):
            if tag := page.header("etag"):
                request.headers["If-None-Match"] = tag
            if changed := page.header("last-modified"):
                request.headers["If-Modified-Since"] = changed
        return None

    def process_response(self, request: Request, response: Response) -> Response:
        if request.meta.get("stored"):
            return response
        if response.status == 304:
            archive: Archive = self.crawler.spider.archive  # type: ignore[union-attr]
            if page := archive.previous.find(request.url):
                request.meta["unchanged_since"] = meta_of(page)
                headers = Headers(page.headers)
                for key, values in response.headers.items():
                    headers[key] = values
                return response_of(page, headers)
        if encoding := response.headers.get("Content-Encoding"):
            if response.body:
                request.meta[ENCODING] = encoding
            else:  # a download that was ended: nothing to decode
                del response.headers["Content-Encoding"]
        return response


class SiteDelays:
    """Wait as long as a site asks for: ``Crawl-delay``, and ``Retry-After`` of status 429 and 503.
    AutoThrottle slows down for slow answers only. A crawl that ends does not wait: requests whose
    time has not come return to the queue.
    """

    def __init__(self, crawler: Crawler) -> None:
        self.crawler = crawler
        crawler.signals.connect(self.robots_parsed, signals.robots_parsed)
        self._poll = LoopingCall(self._return_waiting)  # Scrapy has no signal for the first moment
        crawler.signals.connect(self._start_poll, signals.spider_opened)
        crawler.signals.connect(self._poll.stop, signals.spider_closed)

    def _start_poll(self) -> None:
        self._poll.start(POLL_SECONDS, now=False)

    def _return_waiting(self) -> None:
        engine: Any = self.crawler.engine
        if engine._slot is None or engine._slot.closing is None:
            return
        spider: Any = self.crawler.spider
        spider.stopped = True
        for slot in engine.downloader.slots.values():
            while slot.queue:
                _, waiting = slot.queue.popleft()
                waiting.errback(IgnoreRequest("the crawl ends"))

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "SiteDelays":
        return cls(crawler)

    def robots_parsed(self, robotparser: Any, request: Request) -> None:
        agent = self.crawler.settings["ROBOTSTXT_USER_AGENT"]
        delay = min(robotparser.crawl_delay(agent) or 0.0, MAX_DELAY)
        if delay > self.crawler.settings.getfloat("DOWNLOAD_DELAY"):
            downloader = self.crawler.engine.downloader  # type: ignore[union-attr]
            site = urlsplit(request.url).hostname or ""
            downloader.per_slot_settings[site] = {"delay": delay, "concurrency": 1}
            if slot := downloader.slots.get(site):
                slot.delay = delay

    def process_request(self, request: Request) -> None:
        downloader = self.crawler.engine.downloader  # type: ignore[union-attr]
        if (urlsplit(request.url).hostname or "") in downloader.per_slot_settings:
            request.meta["autothrottle_dont_adjust_delay"] = True

    def process_response(self, request: Request, response: Response) -> Response:
        if response.status in (429, 503):
            slots = self.crawler.engine.downloader.slots  # type: ignore[union-attr]
            if slot := slots.get(request.meta.get("download_slot", "")):
                text = (response.headers.get("Retry-After") or b"").decode("latin-1")
                seconds = float(text) if re.fullmatch(r"\d{1,9}", text) else 2 * slot.delay
                slot.delay = min(max(slot.delay, seconds), MAX_DELAY)
        return response


def domains_of(options: CrawlOptions, seeds: Iterable[str]) -> list[str]:
    """Return the domains whose pages a crawl stores: the stated ones, or those of its seeds."""
    hosts = (urlsplit(url).hostname or "" for url in seeds)
    return list(dict.fromkeys(domain.lower() for domain in options.domains or hosts))


def content_type(headers: Headers) -> str:
    """Return the media type of a response, without parameters, in lower case."""
    value = headers.get("Content-Type") or b""
    return value.decode("latin-1").partition(";")[0].strip().lower()[:100]


def forbids_links(rules: str, agent: str) -> bool:
    """Return whether the rules of a robots meta tag or of ``X-Robots-Tag``, with commas between,
    say nofollow. A rule for another crawler counts, too: ``otherbot: nofollow``.
    """
    for rule in rules.lower().split(","):
        name, _, word = rule.rpartition(":")
        is_none = word.strip() == "none" and name.strip() in ("", agent.lower())
        if word.strip() == "nofollow" or is_none:  # but not max-image-preview:none
            return True
    return False


def is_licence_link(parameters: str) -> bool:
    """Return whether the parameters of a ``Link`` header name a licence file in RSL."""
    text = parameters.lower()
    return "application/rsl+xml" in text and bool(re.search(r"\brel=\"?[^\";]*\blicense\b", text))


def is_robots_request(request: Request) -> bool:
    """Return whether Scrapy itself fetches this, a robots.txt, before the pages of a site."""
    return bool(request.meta.get("dont_obey_robotstxt"))


def response_of(page: StoredPage, headers: Headers) -> Response:
    """Return a stored page as a response."""
    for key in ("X-Crawler-Content-Length", "Content-Length", "Content-Encoding"):
        headers.pop(key, None)
    cls = responsetypes.from_args(headers=headers, url=page.url, body=page.body)
    return cls(page.url, status=200, headers=headers, body=page.body)
