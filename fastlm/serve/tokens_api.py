"""Answer ``POST /v1/embeddings``, and vLLM's ``/tokenize`` and ``/detokenize``."""

import asyncio
import base64
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fastlm.errors import InputError
from fastlm.serve.api_error import ApiError, field_error, server_error, stopping
from fastlm.serve.completions_api import engine_errors
from fastlm.serve.middleware import cancel_on_disconnect
from fastlm.serve.protocol.body import validate
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.embedding import DetokenizeRequest, EmbeddingRequest, TokenizeRequest

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.models import ServedModel

MAX_EMBEDDING_TOKENS = 300_000  # of one request: OpenAI's limit


async def embed(server: "Server", http: Request) -> Response:
    request = await server.parse_body(http, EmbeddingRequest)
    client = http.state.client
    lease = server.models.lease(request, client)
    try:
        http.state.ignored = server.ignored_fields(request, lease.served_model)
        inputs = await server.run_in_thread(_inputs, lease.served_model, request)
        http.state.log_fields["prompt_tokens"] = tokens = sum(map(len, inputs))
        if tokens > MAX_EMBEDDING_TOKENS:
            bound = f"{MAX_EMBEDDING_TOKENS} tokens in one request, got {tokens}"
            raise field_error("input", f"expected at most {bound}")
        with engine_errors():
            server.quota.acquire(client, 1)  # one, since its inputs wait one after the other
        work = _vectors(server, lease.served_model, request, inputs, client)
        try:
            vectors = await cancel_on_disconnect(http.receive, work)
        except TimeoutError:
            raise server_error("input: took too long", 503) from None
        finally:
            server.quota.release(client)
    finally:
        lease.end()
    data = [
        {"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": lease.served_model.name, "usage": usage}
    return Response(to_json(body), media_type="application/json")


def _inputs(served_model: "ServedModel", request: EmbeddingRequest) -> list[list[int]]:
    if (request.dimensions or 0) > (size := served_model.model.config.hidden_size):
        bound = f"the model's {size}, got {request.dimensions}"
        raise field_error("dimensions", f"expected at most {bound}")
    return [served_model.prompt_encoder.encode_for_embedding(text) for text in request.inputs]


async def _vectors(
    server: "Server",
    served_model: "ServedModel",
    request: EmbeddingRequest,
    inputs: list[Any],
    client: str,
) -> list[Any]:
    vectors = []
    async with asyncio.timeout(server.limits.answer_seconds):
        for ids in inputs:  # one by one, so that the engine's steps run between them
            work = partial(served_model.embedding, ids, request.dimensions)
            with engine_errors():
                future = served_model.engine.call(work, client)
            try:
                vectors.append(await asyncio.wrap_future(future))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                raise stopping() from None  # the engine has closed
    if request.encoding_format == "base64":
        return [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
    return [vector.tolist() for vector in vectors]


async def tokenize(server: "Server", http: Request) -> Response:
    request = await server.parse_body(http, TokenizeRequest)
    served_model = server.models.find(request.model or server.models.name)
    return JSONResponse(await server.run_in_thread(_tokens, served_model, request))


def _tokens(served_model: "ServedModel", request: TokenizeRequest) -> dict[str, Any]:
    tokenizer = served_model.tokenizer
    if request.prompt is None:
        chat = validate(request.chat_body(served_model.name), ChatCompletionRequest)
        tokens, _ = served_model.prompt_encoder.encode_chat(chat)
    else:
        try:
            tokens = tokenizer.encode(request.prompt)
        except InputError as error:
            raise ApiError(str(error), param="prompt") from None
        if request.add_special_tokens and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
    names = [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
    return {
        "count": len(tokens), "max_model_len": served_model.context_limit, "tokens": tokens,
        "token_strs": names if request.return_token_strs else None,
    }  # fmt: skip


async def detokenize(server: "Server", http: Request) -> Response:
    request = await server.parse_body(http, DetokenizeRequest)
    tokenizer = server.models.find(request.model or server.models.name).tokenizer
    if (largest := max(request.tokens, default=0)) >= tokenizer.vocab_size:
        raise field_error("tokens", f"expected ids below {tokenizer.vocab_size}, got {largest}")
    return JSONResponse({"prompt": await server.run_in_thread(tokenizer.decode, request.tokens)})
