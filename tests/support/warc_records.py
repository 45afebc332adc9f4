"""WARC records written by hand, for tests."""


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
