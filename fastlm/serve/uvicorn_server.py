"""Run a server with uvicorn: its connections with their time limits, its log, and how it stops."""

import asyncio
import contextlib
import logging
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastlm.errors import InputError
from fastlm.files import reason
from fastlm.serve.http_server import HttpServer
from fastlm.serve.middleware import RequestLimits, log


def run_server(
    server: HttpServer, listening: socket.socket, *, max_connections: int, drain: float
) -> None:
    """Serve on this socket until SIGTERM or Ctrl-C; then responses have ``drain`` seconds."""
    address, port, *_ = listening.getsockname()
    host = f"[{address}]" if ":" in address else address
    log("listening", url=f"http://{host}:{port}", **server.log_fields())
    logging.getLogger("uvicorn.error").addHandler(_UvicornLogHandler())
    logging.getLogger("uvicorn").propagate = False
    config = uvicorn_config(server, max_connections, drain)
    UvicornServer(config, server, drain).run(sockets=[listening])


def uvicorn_config(server: HttpServer, max_connections: int, drain: float) -> uvicorn.Config:
    """Return the configuration of uvicorn for ``server``."""
    http: Any = partial(_Connection, server.limits)
    return uvicorn.Config(
        server.app, log_config=None, access_log=False, server_header=False,
        http=http, proxy_headers=False,  # limited headers; the real address of a connection
        limit_concurrency=max_connections, h11_max_incomplete_event_size=server.limits.header_bytes,
        timeout_graceful_shutdown=int(drain) + 5, ws="none",
    )  # fmt: skip


class _Connection(H11Protocol):
    """A connection of uvicorn with more time limits, since each one counts towards
    ``max_connections``. It is closed if the headers do not arrive in time, if the client does not
    receive the rest of a response, and if a body that no route reads is too large or too slow.

    ``scope["state"]["abort"]`` closes it at once. uvicorn itself closes idle connections between
    requests.
    """

    def __init__(self, limits: RequestLimits, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}  # "headers", "reader", "body"
        self._unread_bytes = 0  # of a body that arrive after the response to its request
        self.app_state = {**self.app_state, "abort": lambda: self.transport.abort()}

    def _start_timer(self, seconds: float, name: str) -> None:
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timers(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer(self.limits.header_seconds, "headers")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timers("headers", "reader")  # uvicorn writes the next response, too
        elif "headers" not in self._timers:
            self._start_timer(self.limits.header_seconds, "headers")
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_timers("body")
        elif "body" in self._timers:
            self._unread_bytes += len(data)
            if self._unread_bytes > self.limits.body_bytes:
                self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_timers("reader")
        self._wait_for_reader(None)
        if self.conn.their_state is h11.SEND_BODY:
            self._unread_bytes = 0
            self._start_timer(self.limits.body_seconds, "body")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timers(*self._timers)

    def _wait_for_reader(self, earlier: int | None) -> None:
        """Abort if the client has received nothing since ``earlier`` bytes were left to send."""
        remaining = self.transport.get_write_buffer_size()
        if earlier is not None and remaining >= earlier:
            self.transport.abort()
        elif remaining:
            wait = self.limits.write_seconds
            self._timers["reader"] = self.loop.call_later(wait, self._wait_for_reader, remaining)


class UvicornServer(uvicorn.Server):
    """A uvicorn server that lets running responses end for at most ``drain`` seconds; then the
    engine ends them with an error that clients receive."""

    def __init__(self, config: uvicorn.Config, server: HttpServer, drain: float):
        super().__init__(config)
        self.server, self.drain = server, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:  # clients may connect from now on
            log("ready")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server.stopping = True
        log("stopping", seconds=self.drain)
        has_drained = asyncio.Event()

        async def close() -> None:
            # close the engine late: accepted requests may still reach it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(has_drained.wait(), self.drain)
            await asyncio.get_running_loop().run_in_executor(None, self.server.end_responses)

        closing = asyncio.create_task(close())
        await super().shutdown(sockets)
        has_drained.set()
        await closing
        # here, since the signal ends the process before `run` returns
        await asyncio.get_running_loop().run_in_executor(None, self.server.close_stores)


class _UvicornLogHandler(logging.Handler):
    """Writes uvicorn's warnings as lines of this server's log."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            error = record.exc_info[0] if record.exc_info else None
            # an exception's message may quote a request
            message = error.__name__ if error else record.getMessage()[:200]
            log("uvicorn", level=record.levelname.lower(), message=message)


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"port: expected a free one on {host}, got {port}: {reason(error)}"
        ) from None
    return listening
