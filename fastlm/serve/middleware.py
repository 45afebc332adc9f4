"""ASGI middleware for every request: authentication, size and time limits, metrics, and the log.

Logs are JSON lines. They contain no text of prompts or answers, and no messages of exceptions,
which may quote that text.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fastlm.serve.api_error import ApiError, server_error
from fastlm.serve.metrics import RequestMetrics

# paths that need no key: they have no data, or tell a load balancer that the server runs
OPEN_PATHS = frozenset(("/", "/rank", "/dashboard", "/health", "/ready"))
OPEN_PREFIX = "/page/"
QUIET_PATHS = frozenset(("/health", "/ready", "/metrics"))  # polled every few seconds
# Of a refused body, that a client may still send
DROP_SECONDS, DROP_BYTES = 1.0, 16 << 20
FAILURE_MESSAGE = "the server failed; its log has the reason under this request's id"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request.

    body_bytes: size of the body. header_bytes: size of the path and the headers. header_seconds:
    time for the headers to arrive, from the connection or their first byte. body_seconds: time for
    the body to arrive. answer_seconds: time after which an answer ends where it is. write_seconds:
    time for a client to receive a part of the response. max_new_tokens: tokens of an answer; None:
    the context is the limit.
    """

    body_bytes: int = 4 * 2**20
    header_bytes: int = 2**16
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    write_seconds: float = 60.0
    max_new_tokens: int | None = None


def log(event: str, **fields: Any) -> None:
    """Write a line of JSON to stderr."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stderr.flush()


class RequestMiddleware:
    """Admits, limits, counts and logs requests.

    ``keys``: API keys; an empty list needs none. ``hosts``: the names by which clients may call the
    server; None allows any. A web page of an attacker would call it by another name. ``paths``: the
    labels of metrics; other paths count as "other".
    """

    def __init__(
        self,
        app: Any,
        *,
        metrics: RequestMetrics,
        limits: RequestLimits,
        keys: Sequence[str],
        hosts: frozenset[str] | None,
        paths: frozenset[str],
    ):
        self.app, self.metrics, self.limits, self.hosts = app, metrics, limits, hosts
        self.keys = [_digest(key) for key in keys]
        self.paths = paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":  # start and shutdown of the server
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        start, log_fields, status = time.perf_counter(), dict[str, Any](), 0
        state = {**scope.get("state", {}), "log_fields": log_fields, "id": secrets.token_hex(16)}
        scope["state"] = state

        async def send_in_time(message: Any) -> None:
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
                # a client that does not read would hold the connection for ever
                if (abort := state.get("abort")) is not None:
                    abort()
                raise ClientDisconnect from None

        try:
            try:
                state["client"] = self._admit(scope)
                await self.app(scope, receive, send_in_time)
            except ClientDisconnect:
                raise
            except Exception as error:
                is_api_error = isinstance(error, ApiError)
                api_error = error if is_api_error else server_error(FAILURE_MESSAGE)
                if not is_api_error:
                    log("failure", id=state["id"], **describe_error(error))
                self.metrics.errors.labels(api_error.code or api_error.kind).inc()
                if status:  # the response has begun: its end is missing
                    log_fields["failed"] = True
                else:
                    body = json.dumps(api_error.body())  # ASCII, so all that it quotes can be sent
                    response = Response(
                        body, api_error.status, api_error.headers, "application/json"
                    )
                    await response(scope, receive, send_in_time)
        except ClientDisconnect:
            log_fields["disconnected"] = True
        finally:
            seconds = time.perf_counter() - start
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status or 499).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            if (observer := state.get("observer")) is not None:
                observer.end(_final_status(status, log_fields))
            if status != 200 or path not in QUIET_PATHS:
                log(
                    "request", id=state["id"], method=scope["method"], path=path,
                    status=status or 499, seconds=round(seconds, 4), **log_fields,
                )  # fmt: skip

    def _admit(self, scope: Any) -> str:
        """Return the client's name: that of its key, else its address.

        ApiError: the key or host is wrong, the headers are too large, or the end of the body is
        ambiguous (RFC 9112, 6.1).
        """
        headers, close = Headers(scope=scope), {"connection": "close"}
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(
                "transfer-encoding: expected this or content-length, got both", headers=close
            )
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > (limit := self.limits.header_bytes):
            raise ApiError(f"headers: expected at most {limit} bytes, got {size}", headers=close)
        if self.hosts is not None and _host_name(headers.get("host", "")) not in self.hosts:
            raise ApiError(
                f"host: expected one of {', '.join(sorted(self.hosts))}, got another"
                " (--allow-host)",
                status=403, param="host",
            )  # fmt: skip
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX)
        if not self.keys or is_open:
            return (scope.get("client") or ("",))[0]
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # compare every key, so that the time does not depend on which one matches
        if sum(hmac.compare_digest(digest, other) for other in self.keys) == 0:
            raise ApiError(
                "authorization: expected 'Bearer KEY' with a key of this server",
                status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return digest.hex()


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """Read the JSON body of a request. ApiError: 415, 413, 408."""
    stream = request.stream()
    try:
        return await _read_body(request, stream, limits)
    except ApiError as error:
        if error.status != 408:
            await _drop(stream)
        raise


async def _drop(stream: AsyncIterator[bytes]) -> None:
    """Read what a client still sends for a moment: a connection that is closed with unread bytes is
    reset, and the client loses the response.
    """
    size = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DROP_SECONDS):
            async for part in stream:
                size += len(part)
                if size > DROP_BYTES:
                    return


async def _read_body(
    request: Request, stream: AsyncIterator[bytes], limits: RequestLimits
) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":  # a web page of another origin cannot send this type
        got = f"got {content_type or 'none'!r:.80}"
        raise _body_error(415, f"content-type: expected application/json, {got}")
    too_large = f"body: expected at most {limits.body_bytes} bytes"
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:19]) > limits.body_bytes:
        raise _body_error(413, too_large)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in stream:
                data += part
                if len(data) > limits.body_bytes:
                    raise _body_error(413, too_large)
        return bytes(data)
    except TimeoutError:
        message = f"body: expected all of it within {limits.body_seconds:g} s"
        raise _body_error(408, message) from None


def _body_error(status: int, message: str) -> ApiError:
    """Return an error that closes the connection, since the body was not read to its end."""
    param = message.partition(":")[0]
    return ApiError(message, status=status, param=param, headers={"connection": "close"})


async def cancel_on_disconnect(receive: Callable[[], Awaitable[Any]], work: Any) -> Any:
    """Return the result of the coroutine ``work``, for a request whose body was read.

    ClientDisconnect: the client has disconnected, and the work is cancelled.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _final_status(status: int, log_fields: Mapping[str, Any]) -> int:
    """Return the status of a response; of a stream that failed after its 200, that of the error."""
    if log_fields.get("disconnected") or log_fields.get("failed"):
        return 499 if log_fields.get("disconnected") else 500
    return log_fields.get("error_status", 200) if status == 200 else status or 499


def key_name(key: str) -> str:
    """Return the name of the client with this API key: its hash."""
    return _digest(key).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _host_name(value: str) -> str:
    """Return the name in a Host header, without the port."""
    name = value.rpartition(":")[0] if value.rpartition(":")[2].isdigit() else value
    return name.strip("[]").lower()


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return the type and the stack of an error, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    stack = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return {"type": type(error).__name__, "stack": stack}
