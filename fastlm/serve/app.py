"""The server's routes, an ASGI application (`fastlm.serve.commands` runs it with uvicorn)."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.inference.requests import Closed, QueueFull
from fastlm.serve import admin_api, opinions, rank_api, tokens_api
from fastlm.serve.answers import Answer, stopping
from fastlm.serve.api_error import ApiError
from fastlm.serve.metrics import Metrics
from fastlm.serve.middleware import (
    ClientDisconnected,
    Limits,
    RequestMiddleware,
    cancel_on_disconnect,
    log,
    read_body,
    stack_of,
)
from fastlm.serve.models import ModelLease, Models, Served
from fastlm.serve.openapi import openapi
from fastlm.serve.previous_response import with_previous
from fastlm.serve.protocol.body import Body, read_request
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.protocol.embedding import EmbeddingRequest
from fastlm.serve.protocol.responses_api import ChatOfResponses, ResponsesRequest
from fastlm.serve.request_builder import build_requests
from fastlm.serve.response_stream import ClientQuota, ResponseStream
from fastlm.serve.responses import StoredResponse
from fastlm.serve.responses_answer import ResponsesAnswer

READERS = 8
WRITERS = 8  # threads that use the feedback database: one that hangs leaves threads to answers
SMALL_BODY = 2**16  # bytes that are parsed in a millisecond or two, without a thread

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore
    from fastlm.serve.hooks import ServerMonitor
    from fastlm.serve.model_manager import ModelManager
    from fastlm.serve.ranking import RankingStore
    from fastlm.serve.ratings import Rating

T = TypeVar("T")
Keep = Callable[[Answer], None]
FILES = Path(__file__).with_name("page")
MOST_EMBEDDED = 300_000  # tokens of one request to /v1/embeddings: OpenAI's limit
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}


@dataclass
class Server:
    """Models, and how they are served; `app` is the ASGI application.

    ``feedback``: where opinions go; None: nowhere. ``monitor``: measures answers; None: nothing
    does. ``ranking``: the store of `fastlm rank` for the page /rank; None:
    no such page. ``keys`` and ``hosts`` as in `fastlm.serve.middleware.RequestMiddleware`.
    ``origins``: of web pages elsewhere that may call the server; "*": any.
    ``manager``: changes the models, for those with one of the keys ``admins``; None: nothing does.
    """

    models: Models
    limits: Limits = field(default_factory=Limits)
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
        if self.monitor is not None:
            self.metrics.add(self.monitor.collect)
        several = len(self.keys) > 1  # clients; without keys all are of this machine
        self.quota = ClientQuota(
            max(1, self.served.engine.max_queue_size // 2) if several else None
        )
        self.stopping = False
        self._ignored: set[str] = set()  # fields that the log has named
        self.writing = CapacityLimiter(WRITERS)
        # Few threads, whatever the clients: each keeps the last 10,000 words that it encoded, 4 MB.
        # More than processors, since some wait for a chat template.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="fastlm-reader")
        post, get = ["POST"], ["GET"]
        routes = [
            Route("/v1/chat/completions", self._complete(ChatCompletionRequest), methods=post),
            Route("/v1/completions", self._complete(CompletionRequest), methods=post),
            Route("/v1/responses", self._complete(ResponsesRequest), methods=post),
            Route("/v1/embeddings", self._embed, methods=post),
            *tokens_api.routes(self),
            Route("/v1/models", self._models, methods=get),
            Route("/v1/models/{id:path}", self._model, methods=get),
            Route("/v1/feedback", partial(opinions.give, self), methods=post),
            Route("/dashboard", self._page("dashboard.html"), methods=get),
            Route("/dashboard/data", self._dashboard, methods=get),
            Route("/health", self._health, methods=get),
            Route("/ready", self._ready, methods=get),
            Route("/metrics", self._metrics, methods=get),
            Route("/openapi.json", self._openapi, methods=get),
            Route("/", self._page("index.html"), methods=get),
            *[
                Route(f"/page/{file.name}", self._page(file.name), methods=get)
                for file in FILES.iterdir()
                if file.suffix in TYPES and file.suffix != ".html"
            ],
        ]
        if self.ranking is not None:
            routes += [Route("/rank", self._page("rank.html"), methods=get)]
            routes += rank_api.routes(self, self.ranking)
        if self.manager is not None:
            routes += admin_api.routes(self, self.manager, self.admins)
            self.metrics.add(self.manager.collect)
        paths = frozenset(route.path for route in routes)
        gate = Middleware(
            RequestMiddleware, metrics=self.metrics, limits=self.limits, hosts=self.hosts,
            paths=paths,
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
            exception_handlers={HTTPException: _http_error, ApiError: self._refused},
        )  # fmt: skip
        self.app.router.redirect_slashes = False

    @property
    def ratings(self) -> Sequence["Rating"]:
        """The numbers that people may give."""
        return () if self.monitor is None else self.monitor.ratings

    @property
    def served(self) -> Served:
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

    # ---- completions

    def _complete(self, model: type[GenerationRequest] | type[ResponsesRequest]) -> Any:
        async def complete(http: HttpRequest) -> Response:
            body = await self.body(http, model)
            request = body.chat if isinstance(body, ResponsesRequest) else body
            if isinstance(body, ResponsesRequest) and body.previous_response_id is not None:
                request = await run_sync(
                    with_previous, body.chat, self.feedback, limiter=self.writing
                )
            kept = self._kept(request)
            turn = self.models.lease(request, http.state.client)
            try:
                answer = await self._begin(http, request, turn)
            except BaseException:
                turn.end()
                raise
            if request.stream:
                return Events(self, answer, turn, kept, http.state.told)
            try:
                body = await cancel_on_disconnect(
                    http.receive, self._whole(answer, turn, kept, http.state.told)
                )
            finally:
                answer.running.close()
                turn.end()
            _tell(http.state.told, answer)
            return Response(body, media_type="application/json")

        return complete

    async def _begin(
        self, http: HttpRequest, request: GenerationRequest, turn: ModelLease
    ) -> Answer:
        """Submit a request, to the current model if the canary refuses it."""
        prefix = "chatcmpl-" if isinstance(request, ChatCompletionRequest) else "cmpl-"
        if isinstance(request, ChatOfResponses):
            prefix = "resp_"
        id = f"{prefix}{http.state.id}"
        try:
            return await self._submit(http, request, turn, id)
        except ApiError:
            if not turn.fall_back():
                raise
        answer = await self._submit(http, request, turn, id)
        await turn.refused(id)
        return answer

    async def _submit(
        self, http: HttpRequest, request: GenerationRequest, turn: ModelLease, id: str
    ) -> Answer:
        served, told = turn.served, http.state.told
        self._note_ignored(http, request, served)
        request, prompts, echoes, requests = await self.read(
            build_requests, served, request, self.limits, http.state.client, self.cache_salt(http)
        )
        told["model"], told["prompt_tokens"] = served.name, sum(map(len, prompts))
        lengths = [len(prompt) for prompt in prompts]
        observer = None
        if self.monitor is not None:  # the gate tells it the end
            observer = http.state.observer = self.monitor.observe(request, served.name, id, lengths)
        with _refusals():
            running = ResponseStream(served.engine, requests, self.metrics, self.quota)
        for length in lengths:
            self.metrics.prompt_length.observe(length)
        kind = ResponsesAnswer if isinstance(request, ChatOfResponses) else Answer
        answer = kind(
            request, id, running, served.tokenizer, echoes, told["prompt_tokens"], served.name
        )
        if observer is not None:
            observer.answer = answer
        return answer

    def cache_salt(self, http: HttpRequest) -> bytes:
        """The clients of several keys share no cached prompts, those of one key or none do."""
        return http.state.client.encode() if len(self.keys) > 1 else b""

    def _note_ignored(
        self, http: HttpRequest, request: GenerationRequest | EmbeddingRequest, served: Served
    ) -> None:
        """Name fields that change nothing: in the response, and once in the log."""
        names = request.ignored_fields
        if "reasoning_effort" in (served.tokenizer.chat_template or ""):
            names = tuple(name for name in names if name != "reasoning_effort")
        http.state.ignored = names
        if new := sorted({*names} - self._ignored):
            self._ignored.update(new)
            log("ignored", fields=new)

    async def _whole(
        self, answer: Answer, turn: ModelLease, kept: Keep | None, told: dict[str, Any]
    ) -> bytes:
        try:
            body = await answer.whole()
        except Exception as error:
            await turn.failed(answer.id, error)
            raise
        await turn.answered(answer)
        if kept is not None:
            await self.store(kept, answer, told)
        return body

    async def store(self, keep: Keep, answer: Answer, told: dict[str, Any]) -> None:
        """Store a conversation. A database that fails costs the conversation, never the answer:
        that is counted and logged, with the reason."""
        try:
            await run_sync(keep, answer, limiter=self.writing)
        except Exception as error:
            told["stored"] = False
            self.metrics.store_failures.inc()
            reason = {"message": str(error)[:200]} if isinstance(error, InputError) else {}
            id = re.split("[-_]", answer.id)[-1]  # of the request
            log("failure", id=id, what="store", **stack_of(error), **reason)

    def _kept(self, request: GenerationRequest) -> Keep | None:
        """What stores the answer once it is known, where the user consents."""
        if not isinstance(request, ChatCompletionRequest) or not request.store:
            return None
        if (store := self.feedback) is None:
            raise ApiError(
                "store: this server keeps no conversations (fastlm serve --feedback)", param="store"
            )

        def keep(answer: Answer) -> None:
            choices = answer.messages()
            store.keep(
                StoredResponse(
                    answer.id, answer.model, request.messages, choices, request.tools,
                    request.conversation_id,
                )
            )  # fmt: skip

        return keep

    # ---- embeddings, models

    async def _embed(self, http: HttpRequest) -> Response:
        request = await self.body(http, EmbeddingRequest)
        turn = self.models.lease(request, http.state.client)
        try:
            return await self._embedded(http, request, turn.served)
        finally:
            turn.end()

    async def _embedded(
        self, http: HttpRequest, request: EmbeddingRequest, served: Served
    ) -> Response:
        self._note_ignored(http, request, served)
        if (request.dimensions or 0) > (size := served.model.config.hidden_size):
            raise ApiError(
                f"dimensions: expected at most the model's {size}, got {request.dimensions}",
                param="dimensions",
            )

        def encode() -> list[list[int]]:
            return [served.prompts.embedded(text) for text in request.inputs]

        inputs = await self.read(encode)
        http.state.told["prompt_tokens"] = tokens = sum(map(len, inputs))
        if tokens > MOST_EMBEDDED:
            raise ApiError(
                f"input: expected at most {MOST_EMBEDDED} tokens in one request, got {tokens}",
                param="input",
            )

        client = http.state.client

        async def one(ids: list[int]) -> np.ndarray:
            with _refusals():
                future = served.engine.call(
                    partial(served.embedding, ids, request.dimensions), client
                )
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                raise stopping() from None  # the engine ended what waited

        async def embed() -> list[Any]:
            async with asyncio.timeout(self.limits.answer_seconds):
                # one by one: the engine's steps run between them
                found = [await one(ids) for ids in inputs]
            if request.encoding_format == "base64":
                return [base64.b64encode(vector.tobytes()).decode() for vector in found]
            return [vector.tolist() for vector in found]

        with _refusals():
            self.quota.acquire(client, 1)  # its inputs wait one after the other
        try:
            vectors = await cancel_on_disconnect(http.receive, embed())
        except TimeoutError:
            raise ApiError("input: took too long", status=503, kind="server_error") from None
        finally:
            self.quota.release(client)
        data = [
            {"object": "embedding", "index": i, "embedding": vector}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    def _described(self, name: str) -> dict[str, Any]:
        served = self.models.named(name)
        own = {
            "context_limit": served.context_limit,
            "chat": served.tokenizer.chat_template is not None,
            "feedback": self.feedback is not None,
            "content_id": served.digest or None,
            "metrics": [rating.row() for rating in self.ratings],
        }
        return {
            "id": name, "object": "model", "created": served.created, "owned_by": "fastlm",
            "fastlm": own,
        }  # fmt: skip

    async def _models(self, _: HttpRequest) -> Response:
        data = [self._described(name) for name in self.models.names]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, http: HttpRequest) -> Response:
        return JSONResponse(self._described(http.path_params["id"]))

    # ---- the rest

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

    def _page(self, name: str) -> Any:
        file = FILES / name
        data, kind = file.read_bytes(), TYPES[file.suffix]

        async def page(_: HttpRequest) -> Response:
            return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

        return page

    async def _refused(self, http: HttpRequest, error: Exception) -> Response:
        raise error  # to the gate, which writes and counts it


class Events(Response):
    """A streamed answer. Ends as `Answer.ends` says, or in an event with an error."""

    def __init__(
        self,
        server: Server,
        answer: Answer,
        turn: ModelLease,
        kept: Keep | None,
        told: dict[str, Any],
    ):
        self.server, self.answer, self.turn, self.kept = server, answer, turn, kept
        self.told, self.background = told, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx passes events on at once
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await cancel_on_disconnect(receive, self._write(send))
        finally:
            self.answer.running.close()
            self.turn.end()
            _tell(self.told, self.answer)

    async def _write(self, send: Any) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            try:
                async for event in self.answer.events():
                    await write(self.answer.encode(event))
            except ClientDisconnected:
                raise
            except Exception as error:
                await self.turn.failed(self.answer.id, error)
                raise
            await self.turn.answered(self.answer)
            if self.kept is not None:
                await self.server.store(self.kept, self.answer, self.told)
            await write(self.answer.ends)
        except ApiError as error:
            self.server.metrics.errors.labels(error.code or error.kind).inc()
            self.told["error"], self.told["error_status"] = error.code or error.kind, error.status
            await write(self.answer.failed(error))
        await write(b"", False)


@contextmanager
def _refusals() -> Iterator[None]:
    """What the engine refuses, as the client's error."""
    try:
        yield
    except QueueFull as full:
        wait = str(max(1, round(full.retry_after)))
        raise ApiError(
            str(full), status=429, code="queue_full", kind="rate_limit_error",
            headers={"retry-after": wait},
        ) from None  # fmt: skip
    except Closed:
        raise stopping() from None
    except InputError as error:
        raise ApiError(str(error)) from None


def _tell(told: dict[str, Any], answer: Answer) -> None:
    told["new_tokens"] = sum(choice.tokens for choice in answer.choices)
    told["finish_reason"] = [choice.finish_reason for choice in answer.choices]
    told["cached_tokens"] = answer.cached_tokens


async def _http_error(request: HttpRequest, error: Any) -> Response:
    """Refuse a path or a method that the server does not have."""
    raise ApiError(
        {404: f"path: wanted one that /openapi.json lists, got {request.url.path!r:.200}"}.get(
            error.status_code, f"method: wanted {(error.headers or {}).get('Allow', 'another')}"
        ),
        status=error.status_code,
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
        headers=error.headers,
    )
