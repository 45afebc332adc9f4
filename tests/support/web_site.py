"""A web server that sends what a test says, byte by byte if need be, and notes what was asked."""

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Answer = bytes | Iterable[bytes]
# (host without port, path with query, headers in lower case) -> bytes to send
Handler = Callable[[str, str, dict[str, str]], Answer]


@dataclass
class WebSite:
    """Port, requests (host, path, headers, time) and the bytes that were sent for each path."""

    port: int = 0
    requests: list[tuple[str, str, dict[str, str], float]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def paths(self, host: str = "127.0.0.1") -> list[str]:
        return [path for name, path, _, _ in list(self.requests) if name == host]


def http(
    body: bytes = b"", status: str = "200 OK", kind: str | None = "text/html", *headers: str
) -> bytes:
    """Return a complete HTTP response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    if kind is not None:
        lines.append(f"Content-Type: {kind}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@contextmanager
def web_site(handler: Handler) -> Iterator[WebSite]:
    """Context: serve on every address of the loopback network, 127.0.0.1 and up."""
    site = WebSite()

    class Connection(socketserver.StreamRequestHandler):
        timeout = 20

        def handle(self):
            lines = []
            while line := self.rfile.readline(65536).decode("latin-1").strip():
                lines.append(line)
            if not lines:
                return
            path = lines[0].split()[1]
            headers = {k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines[1:])}
            host = headers.get("host", "").rpartition(":")[0]
            site.requests.append((host, path, headers, time.monotonic()))
            answer = handler(host, path, headers)
            try:
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    if piece is RESET:
                        option = b"\1\0\0\0\0\0\0\0"  # on, no seconds: close with a reset
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                        return self.connection.close()
                    self.connection.sendall(piece)
                    site.sent[path] = site.sent.get(path, 0) + len(piece)
            except OSError:
                pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        request_queue_size = 64

        def handle_error(self, request, client_address):
            pass

    with Server(("0.0.0.0", 0), Connection) as server:
        site.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield site
        finally:
            server.shutdown()
            server.block_on_close = False


RESET = b"reset"
