"""WARC records written by hand, for tests."""

from urllib.parse import urljoin


def record(
    i: int, body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", *,
    url: str = "", type: str = "response", date: str = "2024-01-01T00:00:00Z",
    headers: tuple[str, ...] = (),
) -> bytes:  # fmt: skip
    """Return one WARC record around an HTTP answer (of type "response") or a bare body."""
    block = body
    if type == "response":
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
        block = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
        kind = "application/http; msgtype=response"
    head = (
        f"WARC/1.0\r\nWARC-Type: {type}\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
        f"WARC-Target-URI: {url or f'http://example.org/{i}'}\r\nWARC-Date: {date}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def wget_archive(url: str, page: bytes) -> bytes:
    """Return what GNU wget 1.25 writes for a site of one page: addresses in angle brackets, then
    its arguments and its log.
    """
    wget = "<metadata://gnu.org/software/wget/warc/{}>"
    return b"".join(
        [
            record(0, b"software: Wget/1.25.0", "application/warc-fields", type="warcinfo"),
            record(1, b"GET / HTTP/1.1", "application/http", type="request", url=f"<{url}>"),
            record(2, page, url=f"<{url}>"),
            record(
                3,
                b"User-agent: *\nDisallow: /x",
                "text/plain",
                url="<" + urljoin(url, "/robots.txt") + ">",
            ),
            record(4, b"<urn:uuid:0>", "text/plain", type="metadata", url=wget.format("MANIFEST")),
            record(5, b"-q -r", "text/plain", type="resource", url=wget.format("arguments.txt")),
            record(6, b"a log", "text/plain", type="resource", url=wget.format("wget.log")),
        ]
    )
