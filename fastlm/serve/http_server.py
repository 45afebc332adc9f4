"""What the servers of fastlm share: pages, checks of requests, the description of the API, threads
that parse, and how they stop. `fastlm.serve.uvicorn_server` runs them."""

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.serve.api_error import ApiError, stopping
from fastlm.serve.metrics import RequestMetrics
from fastlm.serve.middleware import RequestLimits, RequestMiddleware, log, read_body
from fastlm.serve.openapi import Endpoint, openapi
from fastlm.serve.protocol.body import Body, read_request

T = TypeVar("T")
ENCODER_THREADS = 8
SMALL_BODY = 2**16  # bytes that are parsed in 1 to 2 ms, in the event loop
PAGE_FOLDER = Path(__file__).with_name("page")
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
PAGE_FILES = {
    f"/page/{file.name}": file.name
    for file in PAGE_FOLDER.iterdir()
    if file.suffix in CONTENT_TYPES and file.suffix != ".html"
}


@dataclass(kw_only=True)
class HttpServer:
    """A server over HTTP; ``app``, which a subclass creates by `create_app`, is its ASGI
    application.

    ``keys`` and ``hosts``: as in `fastlm.serve.middleware.RequestMiddleware`. ``origins``: the
    origins of web pages that may call the server; "*" allows any. After ``stopping`` is set, the
    server refuses requests.
    """

    limits: RequestLimits = field(default_factory=RequestLimits)
    keys: Sequence[str] = ()
    hosts: frozenset[str] | None = None
    origins: Sequence[str] = ()
    app: Starlette = field(init=False)

    def __post_init__(self) -> None:
        self.stopping = False
        # A fixed number, since each thread caches the last 10,000 words that it encoded, 4 MB.
        # It exceeds the processors, since some threads wait for a chat template.
        self._encoder_threads = ThreadPoolExecutor(
            ENCODER_THREADS, thread_name_prefix="fastlm-encoder"
        )

    def create_app(
        self,
        routes: Sequence[Route],
        *,
        pages: Mapping[str, str],
        posts: Mapping[str, Endpoint],
        gets: Mapping[str, tuple[str, str | None]],
        metrics: RequestMetrics,
        admin_keys: Sequence[str] = (),
    ) -> Starlette:
        """Return the application of ``routes``, of ``pages`` (path -> file of page/) and of what
        all servers have. ``posts``, ``gets``: the description of the routes for `openapi`.
        """

        async def health(_: HttpRequest) -> Response:
            return JSONResponse({"status": "ok"})

        async def ready(_: HttpRequest) -> Response:
            if self.stopping:
                return JSONResponse({"status": "stopping"}, 503)
            return JSONResponse({"status": "ready"})

        async def prometheus(_: HttpRequest) -> Response:
            return Response(metrics.text(), media_type="text/plain; version=0.0.4")

        async def version(_: HttpRequest) -> Response:
            return JSONResponse({"version": importlib.metadata.version("fastlm")})

        async def api(_: HttpRequest) -> Response:
            return JSONResponse(openapi(posts, gets))

        handlers: dict[str, Any] = {
            "/health": health, "/ready": ready, "/metrics": prometheus, "/version": version,
            "/openapi.json": api,
            **{path: _page(name) for path, name in {**pages, **PAGE_FILES}.items()},
        }  # fmt: skip
        routes = [*routes, *(Route(path, get, methods=["GET"]) for path, get in handlers.items())]
        request_middleware = Middleware(
            RequestMiddleware, metrics=metrics, limits=self.limits, hosts=self.hosts,
            paths=frozenset(route.path for route in routes),
            keys=[*self.keys, *admin_keys] if self.keys else (),
        )  # fmt: skip
        cors = Middleware(
            CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send headers of their own
            expose_headers=["x-request-id", "x-fastlm-ignored", "retry-after"],
            allow_private_network=True,  # a public page may call this machine
        )  # fmt: skip
        app = Starlette(
            routes=routes,
            middleware=[cors, request_middleware] if self.origins else [request_middleware],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, ApiError: _reraise},
        )
        app.router.redirect_slashes = False
        return app

    def log_fields(self) -> dict[str, Any]:
        """Return fields of the log's line "listening"."""
        return {}

    def start(self) -> None:
        """Start what answers requests, before the first one."""

    async def close(self) -> None:
        """End what answers requests, after the last one."""

    def end_responses(self) -> None:
        """End the running responses when their time is up."""

    def close_stores(self) -> None:
        """Close databases and files, after the last response."""

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.start()
        yield
        await self.close()
        self._encoder_threads.shutdown(wait=False)
        log("stopped")

    async def run_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that parses or encodes text outside the event loop; return its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder_threads, function, *arguments)

    async def parse_body(self, http: HttpRequest, model: type[Body]) -> Body:
        """Return the JSON body of a request as ``model``. A large body is parsed outside the event
        loop. ApiError: the body is wrong, or the server is stopping.
        """
        if self.stopping:
            raise stopping()
        data = await read_body(http, self.limits)
        if len(data) <= SMALL_BODY:
            return read_request(data, model)
        return await self.run_in_thread(read_request, data, model)


def _page(name: str) -> Any:
    file = PAGE_FOLDER / name
    data, content_type = file.read_bytes(), CONTENT_TYPES[file.suffix]

    async def page(_: HttpRequest) -> Response:
        return Response(data, media_type=content_type, headers={"cache-control": "no-cache"})

    return page


async def _reraise(_: HttpRequest, error: Exception) -> Response:
    raise error  # the middleware writes and counts it


async def _http_error(request: HttpRequest, error: Any) -> Response:
    """Raise the error of an unknown path or method."""
    if error.status_code == 404:
        got = f"{request.url.path!r:.200}"
        raise ApiError(
            f"path: expected one that /openapi.json lists, got {got}", status=404, code="not_found"
        )
    allowed = (error.headers or {}).get("Allow", "another")
    raise ApiError(
        f"method: expected {allowed}", status=error.status_code, code="method_not_allowed",
        headers=error.headers,
    )  # fmt: skip
