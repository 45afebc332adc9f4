"""The server of models as an ASGI application: its routes and what they share.
`fastlm.serve.process` runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.serve import admin_api, feedback_api, rank_api, tokens_api
from fastlm.serve.admin_api import PromoteRequest
from fastlm.serve.api_error import ApiError
from fastlm.serve.completions_api import complete
from fastlm.serve.http_server import HttpServer
from fastlm.serve.metrics import Metrics
from fastlm.serve.middleware import log
from fastlm.serve.models import ServedModel, ServedModels
from fastlm.serve.openapi import Endpoint
from fastlm.serve.protocol.body import EmptyRequest
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.protocol.embedding import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from fastlm.serve.protocol.feedback_request import FeedbackRequest
from fastlm.serve.protocol.responses_api import ResponsesRequest
from fastlm.serve.response_stream import ClientQuota

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.hooks import ServerMonitor
    from fastlm.serve.model_manager import ModelManager
    from fastlm.serve.ranking import RankingStore
    from fastlm.serve.ratings import Rating

DATABASE_THREADS = 8  # for the feedback database: if it hangs, answers have other threads
PAGES = {"/": "index.html", "/dashboard": "dashboard.html"}
COMPLETION_KEYS = "id object created model choices usage"
POSTS: dict[str, Endpoint] = {
    "/v1/chat/completions": ("Answer a conversation", ChatCompletionRequest, COMPLETION_KEYS),
    "/v1/completions": ("Continue a text", CompletionRequest, COMPLETION_KEYS),
    "/v1/responses": (
        "Answer a conversation, in OpenAI's newer API", ResponsesRequest,
        "id object created_at status model output usage",
    ),
    "/v1/embeddings": ("Compute embeddings of texts", EmbeddingRequest, "object data model usage"),
    "/tokenize": (
        "Encode a text or a conversation", TokenizeRequest,
        "count max_model_len tokens token_strs",
    ),
    "/detokenize": ("Decode tokens", DetokenizeRequest, "prompt"),
    "/v1/feedback": ("Give feedback on an answer", FeedbackRequest, "object id text_stored"),
}  # fmt: skip
MANAGER_KEYS = "object status model decisions"
ADMIN: dict[str, Endpoint] = {
    "/v1/admin/promote": ("Promote a model or the canary", PromoteRequest, MANAGER_KEYS),
    "/v1/admin/rollback": (
        "End the canary, or return to the previous model",
        EmptyRequest,
        MANAGER_KEYS,
    ),
}
GETS: dict[str, tuple[str, str | None]] = {
    "/v1/models": ("List the models", "object data"),
    "/dashboard/data": (
        "Return the data of the dashboard",
        "now window since until edges groups drift alerts measurements"
    ),
}  # fmt: skip
ADMIN_GETS = {"/v1/canary": ("Return the state of the canary and the decisions", MANAGER_KEYS)}


@dataclass
class Server(HttpServer):
    """Serves models over HTTP; `app` is the ASGI application.

    ``feedback``: the database of feedback, or None. ``monitor``: measures responses, or None.
    ``ranking``: the store of `fastlm rank` for the page /rank; None: there is no such page.
    ``manager``: changes the models for clients with one of the ``admin_keys``; None: the models do
    not change.
    """

    models: ServedModels
    feedback: "FeedbackStore | None" = None
    ranking: "RankingStore | None" = None
    manager: "ModelManager | None" = None
    admin_keys: Sequence[str] = ()
    monitor: "ServerMonitor | None" = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.metrics = Metrics(self.models.stats)
        for source in (self.monitor, self.manager):
            if source is not None:
                self.metrics.add(source.collect)
        max_queue_size = self.served_model.engine.max_queue_size
        # without keys, all clients are on this machine
        self.quota = ClientQuota(max(1, max_queue_size // 2) if len(self.keys) > 1 else None)
        self._logged_fields: set[str] = set()  # ignored fields that the log has named
        self.database_limiter = CapacityLimiter(DATABASE_THREADS)
        ranks, manages = self.ranking is not None, self.manager is not None
        self.app = self.create_app(
            self._routes(), metrics=self.metrics, admin_keys=self.admin_keys,
            pages={**PAGES, "/rank": "rank.html"} if ranks else PAGES,
            posts=POSTS | (rank_api.PATHS if ranks else {}) | (ADMIN if manages else {}),
            gets=GETS | (ADMIN_GETS if manages else {}),
        )  # fmt: skip

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
        gets: dict[str, Any] = {
            "/v1/models": self._models,
            "/v1/models/{id:path}": self._model,
            "/dashboard/data": self._dashboard,
        }
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

    def log_fields(self) -> dict[str, Any]:
        cache = self.models.stats()
        dtype = self.served_model.engine.block_manager.data.dtype
        return {
            "model": self.models.name, "num_blocks": cache.num_blocks,
            "block_bytes": cache.block_bytes,
            "cache_mib": cache.num_blocks * cache.block_bytes // 2**20,
            "kv_cache_dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip

    def start(self) -> None:
        self.models.start()
        if self.monitor is not None:
            self.monitor.start()

    async def close(self) -> None:
        if not self.stopping:  # else the setter of `stopping` closes the engines
            self.stopping = True
            self.models.close()
        if self.monitor is not None:
            await run_sync(self.monitor.close)

    def end_responses(self) -> None:
        self.models.close()

    def close_stores(self) -> None:
        for store in (self.feedback, self.ranking):
            if store is not None:
                store.close()

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

    async def _dashboard(self, http: HttpRequest) -> Response:
        if self.monitor is None:
            raise ApiError(
                "dashboard: this server has no database for it (fastlm serve --feedback)",
                status=404, code="no_feedback",
            )  # fmt: skip
        return JSONResponse(await self.monitor.dashboard(http.query_params))
