"""What the crawler connects to, and how much of an answer's headers it reads.

A page, a redirect or a name server must not send the crawler to services of its own network. So the
address of every connection is checked when it is established, before a byte is sent: a name that
resolves to another address the second time changes nothing. Rejected: a check in the resolver,
which does not see literal addresses.
"""

import socket
from collections.abc import Iterable
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from scrapy import Request
from scrapy.core.downloader.handlers.http11 import (
    HTTP11DownloadHandler,
    _LenientHTTP11ClientFactory,
    _LenientHTTP11ClientProtocol,
)
from scrapy.crawler import Crawler
from scrapy.exceptions import DownloadCancelledError, IgnoreRequest
from scrapy.http import Response
from twisted.python.failure import Failure
from twisted.web._newclient import BODY, ResponseFailed

NAT64 = IPv6Network("64:ff9b::/96")  # the last 32 bits are an address of IPv4 (RFC 6052)
MAX_HEADER_BYTES = 256 << 10  # of an answer, with its status line: as browsers


class PrivateAddressError(IgnoreRequest):
    """A connection to a private network, which the crawl's seeds do not name."""

    def __init__(self) -> None:
        super().__init__("private address")


class HeadersTooLargeError(DownloadCancelledError):
    """An answer with more than `MAX_HEADER_BYTES` of headers."""


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        nat64 = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not ip.is_multicast


def private_addresses(hosts: Iterable[str]) -> frozenset[str]:
    """Return the addresses of private networks that these hosts have now."""
    addresses = set()
    for host in hosts:
        try:
            answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            continue
        addresses.update(str(answer[4][0]) for answer in answers)
    return frozenset(address for address in addresses if not is_public(address))


class _BoundedProtocol(_LenientHTTP11ClientProtocol):
    """Scrapy's connection, which ends an answer with endless headers."""

    _header_bytes = 0

    def request(self, request: Any) -> Any:
        self._header_bytes = 0
        return super().request(request)

    def dataReceived(self, bytes: bytes) -> None:
        if self._parser is not None and self._parser.state != BODY:
            self._header_bytes += len(bytes)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._giveUp(Failure(HeadersTooLargeError()))
                return
        super().dataReceived(bytes)


class BoundedHandler(HTTP11DownloadHandler):
    """Scrapy's handler of http and https with `MAX_HEADER_BYTES`, and without private addresses but
    those of the crawl's own hosts and of the proxies in the environment.
    """

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        handler = self

        class Factory(_LenientHTTP11ClientFactory):
            def buildProtocol(self, addr: Any) -> Any:
                if not handler.may_connect(addr.host):
                    raise PrivateAddressError
                return _BoundedProtocol(self._quiescentCallback)

        self._pool._factory = Factory

    @cached_property  # when the spider exists
    def _own_addresses(self) -> frozenset[str]:
        spider: Any = self._crawler.spider
        proxies = (urlsplit(url).hostname or "" for url in getproxies().values())
        return private_addresses([*spider.allowed_domains, *proxies])

    def may_connect(self, address: str) -> bool:
        return is_public(address) or address in self._own_addresses

    async def download_request(self, request: Request) -> Response:
        try:
            return await super().download_request(request)
        except Exception as error:
            for reason in _reasons(error):
                if isinstance(reason, (PrivateAddressError, HeadersTooLargeError)):
                    raise reason from None
            raise


def _reasons(error: BaseException | None) -> Iterable[BaseException]:
    """Yield an error and what Scrapy and Twisted wrapped in it."""
    while error is not None:
        yield error
        if isinstance(error, ResponseFailed):
            for failure in error.reasons:
                yield failure.value
        error = error.__cause__
