"""The server as an ASGI application: its routes and what they share. `fastlm.serve.process` runs it
with uvicorn."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.serve import admin_api, feedback_api, rank_api, tokens_api
from fastlm.serve.api_error import ApiError, stopping
from fastlm.serve.completions_api import complete
from fastlm.serve.metrics import Metrics
from fastlm.serve.middleware import RequestLimits, RequestMiddleware, log, read_body
from fastlm.serve.models import ServedModel, ServedModels
from fastlm.serve.openapi import openapi
from fastlm.serve.protocol.body import Body, read_request
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.protocol.embedding import EmbeddingRequest
from fastlm.serve.protocol.responses_api import ResponsesRequest
from fastlm.serve.response_stream import ClientQuota

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.hooks import ServerMonitor
    from fastlm.serve.model_manager import ModelManager
    from fastlm.serve.ranking import RankingStore
    from fastlm.serve.ratings import Rating

T = TypeVar("T")
ENCODER_THREADS = 8
DATABASE_THREADS = 8  # for the feedback database: if it hangs, answers have other threads
SMALL_BODY = 2**16  # bytes that are parsed in 1 to 2 ms, in the event loop
PAGE_FOLDER = Path(__file__).with_name("page")
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/dashboard": "dashboard.html"} | {
    f"/page/{file.name}": file.name
    for file in PAGE_FOLDER.iterdir()
    if file.suffix in CONTENT_TYPES and file.suffix != ".html"
}


@dataclass
class Server:
    """Serves models over HTTP; `app` is the ASGI application.

    ``feedback``: the database of feedback, or None. ``monitor``: measures responses, or None.
    ``ranking``: the store of `fastlm rank` for the page /rank; None: there is no such page.
    ``keys`` and ``hosts``: as in `fastlm.serve.middleware.RequestMiddleware`. ``origins``: the
    origins of web pages that may call the server; "*" allows any. ``manager``: changes the models
    for clients with one of the ``admin_keys``; None: the models do not change.
    """

    models: ServedModels
    limits: RequestLimits = field(default_factory=RequestLimits)
    keys: Sequence[str] = ()
    hosts: frozenset[str] | None = None
    feedback: "FeedbackStore | None" = None
    ranking: "RankingStore | None" = None
    manager: "ModelManager | None" = None
    admin_keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    monitor: "ServerMonitor | None" = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models.stats)
        for source in (self.monitor, self.manager):
            if source is not None:
                self.metrics.add(source.collect)
        max_queue_size = self.served_model.engine.max_queue_size
        # without keys, all clients are on this machine
        self.quota = ClientQuota(max(1, max_queue_size // 2) if len(self.keys) > 1 else None)
        self.stopping = False
        self._logged_fields: set[str] = set()  # ignored fields that the log has named
        self.database_limiter = CapacityLimiter(DATABASE_THREADS)
        # A fixed number, since each thread caches the last 10,000 words that it encoded, 4 MB.
        # It exceeds the processors, since some threads wait for a chat template.
        self._encoder_threads = ThreadPoolExecutor(
            ENCODER_THREADS, thread_name_prefix="fastlm-encoder"
        )
        routes = self._routes()
        request_middleware = Middleware(
            RequestMiddleware, metrics=self.metrics, limits=self.limits, hosts=self.hosts,
            paths=frozenset(route.path for route in routes),
            keys=[*self.keys, *self.admin_keys] if self.keys else (),
        )  # fmt: skip
        cors = Middleware(
            CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send headers of their own
            expose_headers=["x-request-id", "x-fastlm-ignored", "retry-after"],
            allow_private_network=True,  # a public page may call this machine
        )  # fmt: skip
        self.app = Starlette(
            routes=routes,
            middleware=[cors, request_middleware] if self.origins else [request_middleware],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, ApiError: _reraise},
        )  # fmt: skip
        self.app.router.redirect_slashes = False

    def _routes(self) -> list[Route]:
        posts = {
            "/v1/chat/completions": partial(complete, self, ChatCompletionRequest),
            "/v1/completions": partial(complete, self, CompletionRequest),
            "/v1/responses": partial(complete, self, ResponsesRequest),
            "/v1/embeddings": partial(tokens_api.embed, self),
            "/tokenize": partial(tokens_api.tokenize, self),
            "/detokenize": partial(tokens_api.detokenize, self),
            "/v1/feedback": partial(feedback_api.post_feedback, self),
        }
        pages = PAGES if self.ranking is None else {**PAGES, "/rank": "rank.html"}
        gets = {
            "/v1/models": self._models, "/v1/models/{id:path}": self._model,
            "/dashboard/data": self._dashboard, "/health": self._health, "/ready": self._ready,
            "/metrics": self._metrics, "/openapi.json": self._openapi,
            **{path: _page(name) for path, name in pages.items()},
        }  # fmt: skip
        routes = [Route(path, handler, methods=["POST"]) for path, handler in posts.items()]
        routes += [Route(path, handler, methods=["GET"]) for path, handler in gets.items()]
        if self.ranking is not None:
            routes += rank_api.routes(self, self.ranking)
        if self.manager is not None:
            routes += admin_api.routes(self, self.manager, self.admin_keys)
        return routes

    @property
    def ratings(self) -> Sequence["Rating"]:
        """The numbers that people may give."""
        return () if self.monitor is None else self.monitor.ratings

    @property
    def served_model(self) -> ServedModel:
        """The model that answers requests to the server's public name."""
        return self.models.current

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.models.start()
        if self.monitor is not None:
            self.monitor.start()
        yield
        if not self.stopping:  # else the setter of `stopping` closes the engines
            self.stopping = True
            self.models.close()
        self._encoder_threads.shutdown(wait=False)
        if self.monitor is not None:
            await run_sync(self.monitor.close)
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

    def ignored_fields(
        self, request: GenerationRequest | EmbeddingRequest, served_model: ServedModel
    ) -> tuple[str, ...]:
        """Return the fields of a request that have no effect. The log names each field once."""
        names = request.ignored_fields
        if "reasoning_effort" in (served_model.tokenizer.chat_template or ""):
            names = tuple(name for name in names if name != "reasoning_effort")
        if new_names := sorted({*names} - self._logged_fields):
            self._logged_fields.update(new_names)
            log("ignored", fields=new_names)
        return names

    # ---- GET

    def _model_object(self, name: str) -> dict[str, Any]:
        served_model = self.models.find(name)
        extension = {
            "context_limit": served_model.context_limit,
            "chat": served_model.tokenizer.chat_template is not None,
            "feedback": self.feedback is not None,
            "content_id": served_model.digest or None,
            "metrics": [rating.row() for rating in self.ratings],
        }
        return {
            "id": name, "object": "model", "created": served_model.created, "owned_by": "fastlm",
            "fastlm": extension,
        }  # fmt: skip

    async def _models(self, _: HttpRequest) -> Response:
        data = [self._model_object(name) for name in self.models.names]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, http: HttpRequest) -> Response:
        return JSONResponse(self._model_object(http.path_params["id"]))

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: HttpRequest) -> Response:
        if self.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _dashboard(self, http: HttpRequest) -> Response:
        if self.monitor is None:
            raise ApiError(
                "dashboard: this server has no database for it (fastlm serve --feedback)",
                status=404, code="no_feedback",
            )  # fmt: skip
        return JSONResponse(await self.monitor.dashboard(http.query_params))

    async def _openapi(self, _: HttpRequest) -> Response:
        return JSONResponse(openapi(self.ranking is not None, self.manager is not None))


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
