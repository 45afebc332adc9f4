"""The server's routes, an ASGI application (`fastlm.serve.commands` runs it with uvicorn)."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.data.ranking import RankingStore
from fastlm.decode.pages import PAGE
from fastlm.errors import InputError
from fastlm.serve import opinions, rank_api
from fastlm.serve.answers import Answer, sse, stopping
from fastlm.serve.fields import ApiError, checked
from fastlm.serve.gate import Gate, Gone, Limits, log, read_body, unless_gone
from fastlm.serve.grammar import Grammars
from fastlm.serve.metrics import Metrics
from fastlm.serve.openai_api import (
    Asked,
    ChatAsked,
    TextAsked,
    chat_asked,
    embed_asked,
    text_asked,
)
from fastlm.serve.openapi import openapi
from fastlm.serve.prompts import Prompts
from fastlm.serve.requests import Closed, QueueFull, Request
from fastlm.serve.running import Engine, Running, Shares
from fastlm.serve.said import Kept

READERS = 8

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.serve.feedback import FeedbackStore
    from fastlm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
FILES = Path(__file__).with_name("page")
MOST_LOGPROBS = 2**18  # in one response: about 30 MB
MOST_EMBEDDED = 2**17  # tokens of one request to /v1/embeddings
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}


@dataclass
class Server:
    """A model behind an engine, and how it is served; `app` is the ASGI application.

    ``name``: what clients call the model. ``feedback``: where opinions go; None: nowhere.
    ``ranking``: the store of `fastlm rank` for the page /rank; None: no such page. ``keys`` and
    ``hosts`` as in `fastlm.serve.gate.Gate`. ``content_id``: the hash of the model's files
    (`fastlm.runs.content_id`).
    """

    engine: Engine
    model: "CausalLM"
    tokenizer: "Tokenizer"
    name: str
    limits: Limits = field(default_factory=Limits)
    keys: Sequence[str] = ()
    hosts: frozenset[str] | None = None
    feedback: "FeedbackStore | None" = None
    ranking: Path | None = None
    content_id: str | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.stats)
        several = len(self.keys) > 1  # clients; without keys all are of this machine
        self.shares = Shares(max(1, self.engine.max_waiting // 2) if several else None)
        # a cache smaller than the context bounds a request, too
        self.context_limit = min(self.engine.context_limit, self.engine.stats().pages * PAGE)
        self.prompts = Prompts(self.tokenizer, self.context_limit)
        self.grammars = Grammars(self.tokenizer, self.model.config)
        self.started, self.stopping = int(time.time()), False
        # Few threads, whatever the clients: each keeps the last 10,000 words that it encoded, 4 MB.
        # More than processors, since some wait for a chat template.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="fastlm-reader")
        if self.ranking is not None:
            RankingStore(self.ranking).close()  # a wrong file is refused now
        post, get = ["POST"], ["GET"]
        routes = [
            Route("/v1/chat/completions", self._complete(chat_asked), methods=post),
            Route("/v1/completions", self._complete(text_asked), methods=post),
            Route("/v1/embeddings", self._embed, methods=post),
            Route("/v1/models", self._models, methods=get),
            Route("/v1/models/{id:path}", self._model, methods=get),
            Route("/v1/feedback", partial(opinions.give, self), methods=post),
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
        paths = frozenset(route.path for route in routes)
        gate = Middleware(
            Gate, metrics=self.metrics, limits=self.limits, keys=self.keys, hosts=self.hosts,
            paths=paths,
        )  # fmt: skip
        self.app = Starlette(
            routes=routes, middleware=[gate], lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, ApiError: self._refused},
        )  # fmt: skip
        self.app.router.redirect_slashes = False

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        if not self.stopping:  # else who has set it closes the engine
            self.stopping = True
            self.engine.close()
        self._readers.shutdown(wait=False)
        log("stopped")

    async def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of what takes a while and encodes text, outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    # ---- completions

    def _complete(self, read: Callable[[Any], Asked]) -> Any:
        async def complete(http: HttpRequest) -> Response:
            asked = checked(read, await self.body(http))
            kept = self._kept(asked)
            prompts, echoes, requests = await self._read(self._requests, http, asked)
            chat = isinstance(asked, ChatAsked)
            id = f"{'chatcmpl' if chat else 'cmpl'}-{http.state.id}"
            http.state.told["prompt_tokens"] = count = sum(map(len, prompts))
            for prompt in prompts:
                self.metrics.prompt_length.observe(len(prompt))
            with _refusals():
                running = Running(self.engine, requests, self.metrics, self.shares)
            answer = Answer(asked, id, running, self.tokenizer, echoes, count)
            if asked.stream:
                return Events(self, answer, kept, http.state.told)
            try:
                body = await unless_gone(http.receive, answer.whole())
                if kept is not None:
                    await run_sync(kept, answer)
            finally:
                running.close()
            _tell(http.state.told, answer)
            return Response(body, media_type="application/json")

        return complete

    def _requests(
        self, http: HttpRequest, asked: Asked
    ) -> tuple[list[list[int]], list[str], list[Request]]:
        """The prompts, their texts for an echo, and what the engine is asked for. Takes a while."""
        self.check_model(asked.model)
        most = self.limits.new_tokens or self.context_limit
        if (asked.max_new_tokens or 0) > most and self.limits.new_tokens is not None:
            raise ApiError(
                f"max_tokens: wanted at most {most}, got {asked.max_new_tokens}", param="max_tokens"
            )
        echoes: list[str] = []
        if isinstance(asked, ChatAsked):
            prompts = [self.prompts.chat(asked)]
        else:
            assert isinstance(asked, TextAsked)
            prompts = [self.prompts.text(prompt) for prompt in asked.prompts]
            for given in asked.prompts if asked.echo else ():
                text = given if isinstance(given, str) else self.tokenizer.decode(given)
                echoes.append(text)
        # a padded model has more
        vocab = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        for name, ids in (
            ("logit_bias", [id for id, _ in asked.sampling.logit_bias]),
            ("stop_token_ids", asked.stop_ids),
        ):
            if ids and max(ids) >= vocab:
                raise ApiError(
                    f"{name}: wanted token ids below {vocab}, got {max(ids)}", param=name
                )
        constraint = None if asked.form is None else self.grammars.constraint(asked.form)
        requests = [
            Request(
                prompt,
                max_new_tokens=min(
                    asked.max_new_tokens or most, most, self.context_limit - len(prompt)
                ),
                sampling=asked.sampling,
                # choice i of seed s is that of a single request with seed s + i
                seed=None if asked.seed is None else (asked.seed + i) % 2**63,
                stop=asked.stop,
                stop_ids=asked.stop_ids,
                ignore_eos=asked.ignore_eos,
                logprobs=asked.logprobs,
                constraint=constraint,
                deadline=self.limits.answer_seconds,
                client=http.state.client,  # not its `user`, of which it may make up many
            )
            for prompt in prompts
            for i in range(asked.n)
        ]
        if asked.logprobs is not None:
            count = sum(request.max_new_tokens for request in requests) * (asked.logprobs + 1)
            if count > MOST_LOGPROBS:
                raise ApiError(
                    f"logprobs: wanted at most {MOST_LOGPROBS} in one request, got up to {count}:"
                    " answers x max_tokens x (top_logprobs + 1)",
                    param="logprobs",
                )
        return prompts, echoes, requests

    def _kept(self, asked: Asked) -> "Callable[[Answer], None] | None":
        """What stores the answer once it is known, where the user consents."""
        if not isinstance(asked, ChatAsked) or not asked.store:
            return None
        if (store := self.feedback) is None:
            raise ApiError(
                "store: this server keeps no conversations (fastlm serve --feedback)", param="store"
            )

        def keep(answer: Answer) -> None:
            choices = answer.messages()
            store.keep(
                Kept(
                    answer.id, self.name, asked.messages, choices, asked.tools,
                    asked.conversation_id,
                )
            )  # fmt: skip

        return keep

    # ---- embeddings, models

    async def _embed(self, http: HttpRequest) -> Response:
        asked = checked(embed_asked, await self.body(http))
        self.check_model(asked.model)

        def encode() -> list[list[int]]:
            return [self.prompts.text(text, "input", room=0) for text in asked.inputs]

        inputs = await self._read(encode)
        http.state.told["prompt_tokens"] = tokens = sum(map(len, inputs))
        if tokens > MOST_EMBEDDED:
            raise ApiError(
                f"input: wanted at most {MOST_EMBEDDED} tokens in one request, got {tokens}",
                param="input",
            )

        client = http.state.client

        async def one(ids: list[int]) -> np.ndarray:
            with _refusals():
                future = self.engine.call(partial(self._embedding, ids), client)
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
            if asked.base64:
                return [base64.b64encode(vector.tobytes()).decode() for vector in found]
            return [vector.tolist() for vector in found]

        with _refusals():
            self.shares.take(client, 1)  # its inputs wait one after the other
        try:
            vectors = await unless_gone(http.receive, embed())
        except TimeoutError:
            raise ApiError("input: took too long", status=503, kind="server_error") from None
        finally:
            self.shares.give(client)
        data = [
            {"object": "embedding", "index": i, "embedding": vector}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    @torch.inference_mode()
    def _embedding(self, ids: list[int]) -> np.ndarray:
        """The mean of the last layer's output over the tokens, of length 1; float32."""
        hidden = self.model.hidden(torch.tensor([ids], device=self.model.device))[0].float()
        vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        return vector.cpu().numpy().astype("<f4")

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                f"model: wanted {self.name!r}, got {name!r:.80}", status=404, param="model",
                code="model_not_found",
            )  # fmt: skip

    def _described(self) -> dict[str, Any]:
        own = {
            "context_limit": self.context_limit,
            "chat": self.tokenizer.chat_template is not None,
            "feedback": self.feedback is not None,
            "content_id": self.content_id,
        }
        return {
            "id": self.name, "object": "model", "created": self.started, "owned_by": "fastlm",
            "fastlm": own,
        }  # fmt: skip

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, http: HttpRequest) -> Response:
        self.check_model(http.path_params["id"])
        return JSONResponse(self._described())

    # ---- the rest

    async def body(self, http: HttpRequest) -> Any:
        """The JSON body of a request. ApiError: also that the server is stopping."""
        if self.stopping:
            raise stopping()
        return await read_body(http, self.limits)

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: HttpRequest) -> Response:
        if self.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: HttpRequest) -> Response:
        return JSONResponse(openapi(self.ranking is not None))

    def _page(self, name: str) -> Any:
        file = FILES / name
        data, kind = file.read_bytes(), TYPES[file.suffix]

        async def page(_: HttpRequest) -> Response:
            return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

        return page

    async def _refused(self, http: HttpRequest, error: Exception) -> Response:
        raise error  # to the gate, which writes and counts it


class Events(Response):
    """A streamed answer. Ends in "[DONE]", or in an event with an error."""

    def __init__(self, server: Server, answer: Answer, kept: Any, told: dict[str, Any]):
        self.server, self.answer, self.kept, self.told = server, answer, kept, told
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx passes events on at once
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await unless_gone(receive, self._write(send))
        finally:
            self.answer.running.close()
            _tell(self.told, self.answer)

    async def _write(self, send: Any) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async for event in self.answer.events():
                await write(sse(event))
            if self.kept is not None:
                await run_sync(self.kept, self.answer)
            await write(sse("[DONE]"))
        except InputError as error:
            if not isinstance(error, ApiError):  # the feedback database
                log("failure", type="InputError", what=self.told.get("path", "store"))
                error = ApiError("the conversation was not kept", status=500, kind="server_error")
            self.server.metrics.errors.labels(error.code or error.kind).inc()
            self.told["error"] = error.code or error.kind
            await write(sse(error.body()))
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


async def _http_error(_: HttpRequest, error: Any) -> Response:
    """Refuse a path or a method that the server does not have."""
    raise ApiError(
        {404: "path: wanted one of the API's, got another"}.get(
            error.status_code, f"method: wanted {(error.headers or {}).get('Allow', 'another')}"
        ),
        status=error.status_code,
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
        headers=error.headers,
    )


__all__ = ["Gone", "Server"]
