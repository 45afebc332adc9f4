"""The options of ``fastlm data crawl``. Imports nothing heavy, and no Scrapy."""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from fastlm.errors import InputError
from fastlm.pipeline.stage import Positional, at_least_one, not_negative, positive
from fastlm.sources.document import MAX_DOCUMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class CrawlOptions:
    """The options of ``fastlm data crawl``."""

    seeds: Annotated[
        tuple[str, ...], Positional("Begin at these URLs, or at those in a file, one per line")
    ]
    out: Annotated[Path, "Write WARC files to this folder, or continue its crawl", "-o"]
    contact: Annotated[
        str, "Tell sites whom to write to: a web page or an e-mail address. Part of the user agent"
    ]
    agent: Annotated[str, "Crawl under this name, which robots.txt files address"] = "fastlm"
    domains: Annotated[
        tuple[str, ...], "Follow links to these domains and their subdomains. Default: the seeds'"
    ] = ()
    depth: Annotated[int, "Follow at most this many links from a seed"] = 10
    max_pages: Annotated[int, "Stop after this many pages and those under way"] = 10_000
    max_bytes: Annotated[int, "Stop after this many bytes of decoded pages"] = 10 * 10**9
    max_page_bytes: Annotated[int, "Skip pages with more bytes, compressed or not"] = 4 * 2**20
    max_seconds: Annotated[float | None, "Stop after this time"] = None
    delay: Annotated[float, "Wait at least this many seconds between two requests to a site"] = 1.0
    concurrency: Annotated[int, "Crawl at most this many sites at once"] = 16
    timeout: Annotated[float, "Give up a download after this many seconds"] = 60.0
    previous: Annotated[
        Path | None, "Ask for changes since this earlier crawl: a folder or a WARC file"
    ] = None

    def check(self) -> None:
        """Refuse options that cannot work. InputError names the option."""
        at_least_one(self, "max_pages", "max_bytes", "max_page_bytes", "concurrency")
        not_negative(self, "depth", "delay")
        positive(self, "timeout", "max_seconds")
        if self.max_page_bytes > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"max_page_bytes: expected at most {MAX_DOCUMENT_BYTES:,}, which is what `fastlm "
                f"data prepare` reads, got {self.max_page_bytes:,}"
            )
        if not re.fullmatch(r"[A-Za-z_-]+", self.agent):  # RFC 9309, 2.2.1
            raise InputError(f"agent: expected letters, - and _, got {self.agent!r:.80}")
        if not re.fullmatch(
            r"https?://[\x21-\x7e]+\.[\x21-\x7e]+|[\x21-\x7e]+@[\x21-\x7e]+", self.contact
        ):
            raise InputError(
                f"contact: expected a web page or an e-mail address, got {self.contact!r:.80}"
            )
        for domain in self.domains:
            if not re.fullmatch(r"[^\s/:@]+", domain):
                raise InputError(f"domains: expected a name like example.org, got {domain!r:.80}")

    @property
    def user_agent(self) -> str:
        """The ``User-Agent`` header: product, version and contact."""
        return f"{self.agent}/{version('fastlm')} (+{self.contact})"
