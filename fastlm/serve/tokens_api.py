"""``POST /tokenize`` and ``/detokenize``, as vLLM has them: what clients count tokens by."""

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.serve.api_error import ApiError
from fastlm.serve.generic_tools import with_generic_tools
from fastlm.serve.protocol.body import validate
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.embedding import DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.models import Served


def routes(server: "Server") -> list[Route]:
    async def tokenize(http: Request) -> Response:
        request = await server.body(http, TokenizeRequest)
        served = server.models.named(request.model or server.models.name)
        return JSONResponse(await server.read(_tokenize, served, request))

    async def detokenize(http: Request) -> Response:
        request = await server.body(http, DetokenizeRequest)
        served = server.models.named(request.model or server.models.name)
        vocab = served.tokenizer.vocab_size
        if (largest := max(request.tokens, default=0)) >= vocab:
            raise ApiError(f"tokens: expected ids below {vocab}, got {largest}", param="tokens")
        text = await server.read(served.tokenizer.decode, request.tokens)
        return JSONResponse({"prompt": text})

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _tokenize(served: "Served", request: TokenizeRequest) -> dict[str, Any]:
    tokenizer = served.tokenizer
    if request.prompt is None:
        chat = validate(request.chat_body(served.name), ChatCompletionRequest)
        tokens = served.prompts.chat(with_generic_tools(chat, served.prompts.why_not))
    else:
        try:
            tokens = tokenizer.encode(request.prompt)
        except InputError as error:
            raise ApiError(str(error), param="prompt") from None
        if request.add_special_tokens and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
    names = [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
    return {
        "count": len(tokens), "max_model_len": served.context_limit, "tokens": tokens,
        "token_strs": names if request.return_token_strs else None,
    }  # fmt: skip
