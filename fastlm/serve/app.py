"""The server's routes, an ASGI application (`fastlm.serve.commands` runs it with uvicorn)."""

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
READERS = 8
WRITERS = 8  # threads that use the feedback database: one that hangs leaves threads to answers
SMALL_BODY = 2**16  # bytes that are parsed in a millisecond or two, without a thread
FILES = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/dashboard": "dashboard.html"} | {
    f"/page/{file.name}": file.name
    for file in FILES.iterdir()
    if file.suffix in TYPES and file.suffix != ".html"
}


@dataclass
class Server:
    """ServedModels, and how they are served; `app` is the ASGI application.

    ``feedback``: the database of feedback, or None. ``monitor``: measures answers, or None.
    ``ranking``: the store of `fastlm rank` for the page /rank; None:
    no such page. ``keys`` and ``hosts`` as in `fastlm.serve.middleware.RequestMiddleware`.
    ``origins``: of web pages elsewhere that may call the server; "*": any.
    ``manager``: changes the models, for those with one of the keys ``admins``; None: nothing does.
    """

    models: ServedModels
    limits: RequestLimits = field(default_factory=RequestLimits)
    keys: Sequence[str] = ()
    hosts: frozenset[str] | None = None
    feedback: "FeedbackStore | None" = None
    ranking: "RankingStore | None" = None
    manager: "ModelManager | None" = None
    admins: Sequence[str] = ()
    origins: Sequence[str] = ()
    monitor: "ServerMonitor | None" = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models.stats)
        for source in (self.monitor, self.manager):
            if source is not None:
                self.metrics.add(source.collect)
        several = len(self.keys) > 1  # clients; without keys all are of this machine
        self.quota = ClientQuota(
            max(1, self.served_model.engine.max_queue_size // 2) if several else None
        )
        self.stopping = False
        self._ignored: set[str] = set()  # fields that the log has named
        self.writing = CapacityLimiter(WRITERS)
        # Few threads, whatever the clients: each keeps the last 10,000 words that it encoded, 4 MB.
        # More than processors, since some wait for a chat template.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="fastlm-reader")
        routes = self._routes()
        gate = Middleware(
            RequestMiddleware, metrics=self.metrics, limits=self.limits, hosts=self.hosts,
            paths=frozenset(route.path for route in routes),
            keys=[*self.keys, *self.admins] if self.keys else (),
        )  # fmt: skip
        pages = Middleware(
            CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send names of their own
            expose_headers=["x-request-id", "x-fastlm-ignored", "retry-after"],
            allow_private_network=True,  # a public page that calls this machine
        )  # fmt: skip
        self.app = Starlette(
            routes=routes, middleware=[pages, gate] if self.origins else [gate],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, ApiError: _refused},
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
        routes = [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
        routes += [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
        if self.ranking is not None:
            routes += rank_api.routes(self, self.ranking)
        if self.manager is not None:
            routes += admin_api.routes(self, self.manager, self.admins)
        return routes

    @property
    def ratings(self) -> Sequence["Rating"]:
        """The numbers that people may give."""
        return () if self.monitor is None else self.monitor.ratings

    @property
    def served_model(self) -> ServedModel:
        """The model that answers to the server's name."""
        return self.models.current

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.models.start()
        if self.monitor is not None:
            self.monitor.start()
        yield
        if not self.stopping:  # else who has set it closes the engines
            self.stopping = True
            self.models.close()
        self._readers.shutdown(wait=False)
        if self.monitor is not None:
            await run_sync(self.monitor.close)
        log("stopped")

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of what takes a while and encodes text, outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    async def body(self, http: HttpRequest, model: type[Body]) -> Body:
        """Return the JSON body of a request as ``model``. ApiError: also that the server is
        stopping. A large body is parsed and checked outside the event loop.
        """
        if self.stopping:
            raise stopping()
        data = await read_body(http, self.limits)
        if len(data) <= SMALL_BODY:
            return read_request(data, model)
        return await self.read(read_request, data, model)

    def ignored(
        self, request: GenerationRequest | EmbeddingRequest, served_model: ServedModel
    ) -> tuple[str, ...]:
        """The fields of a request that change nothing, which the log names once."""
        names = request.ignored_fields
        if "reasoning_effort" in (served_model.tokenizer.chat_template or ""):
            names = tuple(name for name in names if name != "reasoning_effort")
        if new := sorted({*names} - self._ignored):
            self._ignored.update(new)
            log("ignored", fields=new)
        return names

    # ---- GET

    def _described(self, name: str) -> dict[str, Any]:
        served_model = self.models.find(name)
        own = {
            "context_limit": served_model.context_limit,
            "chat": served_model.tokenizer.chat_template is not None,
            "feedback": self.feedback is not None,
            "content_id": served_model.digest or None,
            "metrics": [rating.row() for rating in self.ratings],
        }
        return {
            "id": name, "object": "model", "created": served_model.created, "owned_by": "fastlm",
            "fastlm": own,
        }  # fmt: skip

    async def _models(self, _: HttpRequest) -> Response:
        data = [self._described(name) for name in self.models.names]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, http: HttpRequest) -> Response:
        return JSONResponse(self._described(http.path_params["id"]))

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
    file = FILES / name
    data, kind = file.read_bytes(), TYPES[file.suffix]

    async def page(_: HttpRequest) -> Response:
        return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

    return page


async def _refused(_: HttpRequest, error: Exception) -> Response:
    raise error  # to the middleware, which writes and counts it


async def _http_error(request: HttpRequest, error: Any) -> Response:
    """Refuse a path or a method that the server does not have."""
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
