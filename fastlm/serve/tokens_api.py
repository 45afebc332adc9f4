"""``POST /tokenize`` and ``/detokenize``, as vLLM has them: what clients count tokens by."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.serve.fields import ApiError, Field, checked, flag, list_of, name, read_fields, text
from fastlm.serve.generic_tools import generic
from fastlm.serve.openai_api import CHAT, IDS, chat_asked

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.models import Served

MOST_CHARACTERS = 2**20  # of a text, which may be longer than a context: 0.5 s
OF_CHAT = ("tools", "chat_template_kwargs", "add_generation_prompt")
TOKENIZE: Mapping[str, Field] = {
    "model": name(256),
    "prompt": text(MOST_CHARACTERS, empty=True),
    "messages": Field(CHAT["messages"].read, CHAT["messages"].schema),
    **{name: CHAT[name] for name in OF_CHAT},
    "add_special_tokens": flag(True),
    "return_token_strs": flag(),
}
DETOKENIZE: Mapping[str, Field] = {
    "model": name(256),
    "tokens": Field(list_of(IDS, 0, MOST_CHARACTERS).read, list_of(IDS, 0, MOST_CHARACTERS).schema,
                    required=True),
}  # fmt: skip


def routes(server: "Server") -> list[Route]:
    async def tokenize(http: Request) -> Response:
        body, given = await server.body(http, lambda body: (body, read_fields(body, TOKENIZE)))
        if (given["prompt"] is None) == (given["messages"] is None):
            raise ApiError("prompt: expected this or messages", param="prompt")
        served = server.models.named(given["model"] or server.models.name)
        return JSONResponse(await server.read(_tokenized, served, body, given))

    async def detokenize(http: Request) -> Response:
        given = await server.body(http, partial(read_fields, fields=DETOKENIZE))
        served = server.models.named(given["model"] or server.models.name)
        most = served.tokenizer.vocab_size
        if bad := [token for token in given["tokens"] if token >= most]:
            raise ApiError(f"tokens: expected ids below {most}, got {bad[0]}", param="tokens")
        text = await server.read(served.tokenizer.decode, list(given["tokens"]))
        return JSONResponse({"prompt": text})

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _tokenized(served: "Served", body: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    tokenizer = served.tokenizer
    if given["messages"] is not None:
        chat = {key: body[key] for key in ("messages", *OF_CHAT) if key in body}
        asked = chat_asked({"model": served.name, **chat})
        tokens = served.prompts.chat(generic(asked, served.prompts.why_not))
    else:
        tokens = checked(tokenizer.encode, given["prompt"])
        if given["add_special_tokens"] and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
    names = [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
    return {
        "count": len(tokens), "max_model_len": served.context_limit, "tokens": tokens,
        "token_strs": names if given["return_token_strs"] else None,
    }  # fmt: skip
