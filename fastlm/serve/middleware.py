"""What every request passes: who may ask, how long a client may take, and what is logged of it.

An ASGI middleware. Logs are JSON lines without the text of prompts or answers, and without the
messages of exceptions, which may quote them.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from fastlm.serve.api_error import ApiError
from fastlm.serve.metrics import Metrics
from fastlm.serve.response_stream import wait_for_disconnect

# without a key: what holds no data, and what tells a balancer that the server lives
OPEN_PATHS = frozenset(("/", "/rank", "/dashboard", "/health", "/ready"))
OPEN_PREFIX = "/page/"
QUIET_PATHS = frozenset(("/health", "/ready", "/metrics"))  # asked every few seconds
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """Bounds on a request.

    body_bytes: of its body. header_bytes: of its path and headers. header_seconds: until the
    headers have arrived, since the connection or their first byte. body_seconds: until the body
    has arrived. answer_seconds: until an answer ends, wherever it is then. write_seconds: until a
    client takes what was sent to it. new_tokens: of an answer; None: the context is the bound.
    """

    body_bytes: int = 4 * 2**20
    header_bytes: int = 2**16
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    write_seconds: float = 60.0
    new_tokens: int | None = None


class ClientDisconnected(Exception):
    """The client has closed the connection, or does not read."""


def log(event: str, **told: Any) -> None:
    """Write a line of JSON to stderr."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **told}
    sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stderr.flush()


class RequestMiddleware:
    """``keys``: API keys; none: no key is asked for. ``hosts``: names by which clients may call the
    server (an attacker's page in a browser would call it by another); None: any.
    """

    def __init__(
        self,
        app: Any,
        *,
        metrics: Metrics,
        limits: Limits,
        keys: Sequence[str],
        hosts: frozenset[str] | None,
        paths: frozenset[str],
    ):
        self.app, self.metrics, self.limits, self.hosts = app, metrics, limits, hosts
        self.keys = [_digest(key) for key in keys]
        self.paths = paths  # labels of metrics: others are "other"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        told: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "told": told, "id": secrets.token_hex(16)}
        status = 0

        async def sender(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = MutableHeaders(raw=message["headers"])
                more.update(HEADERS | {"x-request-id": scope["state"]["id"]})
                if ignored := scope["state"].get("ignored"):
                    more["x-fastlm-ignored"] = ", ".join(ignored)
            try:
                async with asyncio.timeout(self.limits.write_seconds):
                    await send(message)
            except (TimeoutError, OSError):
                # what the client did not take would hold the connection for ever
                if (abort := scope["state"].get("abort")) is not None:
                    abort()
                raise ClientDisconnected from None

        try:
            try:
                self._check_framing(scope, headers)
                scope["state"]["client"] = self._admit(scope, headers)
                await self.app(scope, receive, sender)
            except ApiError as error:
                await self.refuse(error)(scope, receive, sender)
            except ClientDisconnected:
                told["gone"] = True
            except Exception as error:
                log("failure", id=scope["state"]["id"], **stack_of(error))
                if status:  # in the middle of a response: its end is missing
                    told["failed"] = True
                    self.metrics.errors.labels("server_error").inc()
                else:
                    failed = ApiError(
                        "the server failed; its log has the reason under this request's id",
                        status=500, kind="server_error",
                    )  # fmt: skip
                    await self.refuse(failed)(scope, receive, sender)
        except ClientDisconnected:
            told["gone"] = True
        finally:
            seconds = time.perf_counter() - began
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status or 499).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            if (observer := scope["state"].get("observer")) is not None:
                observer.end(_outcome(status, told))
            if status != 200 or path not in QUIET_PATHS:
                log(
                    "request", id=scope["state"]["id"], method=scope["method"], path=path,
                    status=status or 499, seconds=round(seconds, 4), **told,
                )  # fmt: skip

    def refuse(self, error: ApiError) -> Response:
        self.metrics.errors.labels(error.code or error.kind).inc()
        told = json.dumps(error.body())  # in ASCII: whatever it quotes can be sent
        return Response(told, error.status, error.headers, "application/json")

    def _check_framing(self, scope: Any, headers: Headers) -> None:
        """ApiError: where the body ends can be read in two ways (RFC 9112, 6.1), or headers that
        are too large. The connection is closed."""
        close = {"connection": "close"}
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(
                "transfer-encoding: expected this or content-length, got both", headers=close
            )
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > (most := self.limits.header_bytes):
            raise ApiError(f"headers: expected at most {most} bytes, got {size}", headers=close)

    def _admit(self, scope: Any, headers: Headers) -> str:
        """The client's name: that of its key, else its address. ApiError: it may not ask."""
        if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
            raise ApiError(
                f"host: wanted one of {', '.join(sorted(self.hosts))}, got another (--allow-host)",
                status=403,
                param="host",
            )
        open_path = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX)
        if not self.keys or open_path:
            return (scope.get("client") or ("",))[0]
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # every key is compared, whichever fits
        if sum(hmac.compare_digest(given, one) for one in self.keys) == 0:
            raise ApiError(
                "authorization: wanted 'Bearer KEY' with a key of this server",
                status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return given.hex()


async def read_body(request: Request, limits: Limits) -> bytes:
    """The JSON body of a request. ApiError: 415, 413, 408."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page elsewhere cannot send through a browser
        raise ApiError(
            f"content-type: wanted application/json, got {kind or 'none'!r:.80}",
            status=415, param="content-type",
        )  # fmt: skip
    most = ApiError(
        f"body: wanted at most {limits.body_bytes} bytes", status=413, param="body",
        headers={"connection": "close"},
    )  # fmt: skip
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:19]) > limits.body_bytes:
        raise most
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                data += message.get("body", b"")
                if len(data) > limits.body_bytes:
                    raise most
                if not message.get("more_body"):
                    return bytes(data)
    except TimeoutError:
        raise ApiError(
            f"body: wanted all of it within {limits.body_seconds:g} s", status=408, param="body",
            headers={"connection": "close"},
        ) from None  # fmt: skip


async def cancel_on_disconnect(receive: Callable[[], Awaitable[Any]], work: Any) -> Any:
    """Return the result of the coroutine ``work``. ClientDisconnected: the client went away.
    Then the work is cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _outcome(status: int, told: Mapping[str, Any]) -> int:
    """The status of a response, or what it would have been: a stream fails after its 200."""
    if told.get("gone"):
        return 499
    if status == 200:
        return 500 if told.get("failed") else told.get("error_status", 200)
    return 500 if told.get("failed") else status or 499


def key_name(key: str) -> str:
    """The name of the client that has an API key."""
    return _digest(key).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _host(value: str) -> str:
    """The name in a Host header, without the port."""
    name = value.rpartition(":")[0] if value.rpartition(":")[2].isdigit() else value
    return name.strip("[]").lower()


def stack_of(error: BaseException) -> dict[str, Any]:
    """The type of an error and where it was raised, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return {"type": type(error).__name__, "stack": places}
