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
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fastlm.serve.api_error import ApiError, server_error
from fastlm.serve.metrics import Metrics

# without a key: what holds no data, and what tells a balancer that the server lives
OPEN_PATHS = frozenset(("/", "/rank", "/dashboard", "/health", "/ready"))
OPEN_PREFIX = "/page/"
QUIET_PATHS = frozenset(("/health", "/ready", "/metrics"))  # asked every few seconds
FAILED = "the server failed; its log has the reason under this request's id"
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
        if scope["type"] == "lifespan":  # the beginning and the end of the server
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        began, told, status = time.perf_counter(), dict[str, Any](), 0
        state = {**scope.get("state", {}), "told": told, "id": secrets.token_hex(16)}
        scope["state"] = state

        async def sender(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers.update(HEADERS | {"x-request-id": state["id"]})
                if ignored := state.get("ignored"):
                    headers["x-fastlm-ignored"] = ", ".join(ignored)
            try:
                async with asyncio.timeout(self.limits.write_seconds):
                    await send(message)
            except (TimeoutError, OSError):
                # what the client did not take would hold the connection for ever
                if (abort := state.get("abort")) is not None:
                    abort()
                raise ClientDisconnect from None

        try:
            try:
                state["client"] = self._admit(scope)
                await self.app(scope, receive, sender)
            except ClientDisconnect:
                raise
            except Exception as error:
                refused = error if isinstance(error, ApiError) else server_error(FAILED)
                if refused is not error:
                    log("failure", id=state["id"], **stack_of(error))
                self.metrics.errors.labels(refused.code or refused.kind).inc()
                if status:  # in the middle of a response: its end is missing
                    told["failed"] = True
                else:
                    body = json.dumps(refused.body())  # in ASCII: whatever it quotes can be sent
                    refusal = Response(body, refused.status, refused.headers, "application/json")
                    await refusal(scope, receive, sender)
        except ClientDisconnect:
            told["gone"] = True
        finally:
            seconds = time.perf_counter() - began
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status or 499).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            if (observer := state.get("observer")) is not None:
                observer.end(_outcome(status, told))
            if status != 200 or path not in QUIET_PATHS:
                log(
                    "request", id=state["id"], method=scope["method"], path=path,
                    status=status or 499, seconds=round(seconds, 4), **told,
                )  # fmt: skip

    def _admit(self, scope: Any) -> str:
        """The client's name: that of its key, else its address. ApiError: it may not ask, its
        headers are too large, or where the body ends can be read in two ways (RFC 9112, 6.1)."""
        headers, close = Headers(scope=scope), {"connection": "close"}
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(
                "transfer-encoding: expected this or content-length, got both", headers=close
            )
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > (most := self.limits.header_bytes):
            raise ApiError(f"headers: expected at most {most} bytes, got {size}", headers=close)
        if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
            raise ApiError(
                f"host: expected one of {', '.join(sorted(self.hosts))}, got another"
                " (--allow-host)",
                status=403, param="host",
            )  # fmt: skip
        open_path = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX)
        if not self.keys or open_path:
            return (scope.get("client") or ("",))[0]
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # every key is compared, whichever fits
        if sum(hmac.compare_digest(given, one) for one in self.keys) == 0:
            raise ApiError(
                "authorization: expected 'Bearer KEY' with a key of this server",
                status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return given.hex()


async def read_body(request: Request, limits: Limits) -> bytes:
    """The JSON body of a request. ApiError: 415, 413, 408."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page elsewhere cannot send through a browser
        got = f"got {kind or 'none'!r:.80}"
        raise _unread(415, f"content-type: expected application/json, {got}")
    large = f"body: expected at most {limits.body_bytes} bytes"
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:19]) > limits.body_bytes:
        raise _unread(413, large)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                data += part
                if len(data) > limits.body_bytes:
                    raise _unread(413, large)
        return bytes(data)
    except TimeoutError:
        slow = f"body: expected all of it within {limits.body_seconds:g} s"
        raise _unread(408, slow) from None


def _unread(status: int, message: str) -> ApiError:
    """An error about a request whose body was not read to its end: the connection is closed."""
    param = message.partition(":")[0]
    return ApiError(message, status=status, param=param, headers={"connection": "close"})


async def cancel_on_disconnect(receive: Callable[[], Awaitable[Any]], work: Any) -> Any:
    """Return the result of the coroutine ``work``, for a request whose body has been read.
    ClientDisconnect: the client went away. Then the work is cancelled."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _outcome(status: int, told: Mapping[str, Any]) -> int:
    """The status of a response, or what it would have been: a stream fails after its 200."""
    if told.get("gone") or told.get("failed"):
        return 499 if told.get("gone") else 500
    return told.get("error_status", 200) if status == 200 else status or 499


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
