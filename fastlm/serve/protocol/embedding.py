"""The requests of ``POST /v1/embeddings`` and of vLLM's ``/tokenize`` and ``/detokenize``."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Tag, model_validator

from fastlm.serve.api_error import field_error
from fastlm.serve.protocol.body import INTEGER, EmptyOrText, Label, ModelName, RequestBody, TokenIds
from fastlm.serve.protocol.chat_completion import Messages, TemplateVariables, Tools
from fastlm.serve.protocol.completion import ITEM, PROMPT, Ids, prompt_list

MAX_INPUTS = 2048  # OpenAI's limit
MAX_CHARACTERS = 2**20  # of a text, which may exceed the context; encoding takes 0.5 s
EmbeddingText = Annotated[EmptyOrText, Tag("text")]


class EmbeddingRequest(RequestBody):
    model: ModelName
    input: Annotated[
        EmbeddingText
        | Ids
        | Annotated[
            list[Annotated[EmbeddingText | Ids, ITEM]],
            Field(min_length=1, max_length=MAX_INPUTS), Field(fail_fast=True), Tag("list"),
        ],
        PROMPT,
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**20), INTEGER] | None = None
    user: Label | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return prompt_list(self.input)


class TokenizeRequest(RequestBody):
    """A request with either ``prompt`` or ``messages``."""

    model: ModelName | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "expected this or messages")
        return self

    def chat_body(self, model: str) -> dict[str, Any]:
        names = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt")
        return {"model": model, **{name: getattr(self, name) for name in names}}


class DetokenizeRequest(RequestBody):
    model: ModelName | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_CHARACTERS)]
