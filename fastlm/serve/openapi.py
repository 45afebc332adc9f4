"""The API's description for /openapi.json, made from the models of requests and responses."""

import importlib.metadata
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from fastlm.serve import rank_api
from fastlm.serve.admin_api import PromoteRequest
from fastlm.serve.protocol.body import EmptyRequest, RequestBody
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest, ChatCompletionResponse
from fastlm.serve.protocol.completion import CompletionRequest, CompletionResponse
from fastlm.serve.protocol.embedding import (
    DetokenizeRequest,
    EmbeddingRequest,
    EmbeddingResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from fastlm.serve.protocol.feedback_request import FeedbackRequest
from fastlm.serve.protocol.responses_api import ResponsesRequest, ResponsesResponse

# path: what it does, its request, and its response: a model, or the keys of an object
POSTS: dict[str, tuple[str, type[RequestBody], type[BaseModel] | str]] = {
    "/v1/chat/completions": (
        "Answer a conversation", ChatCompletionRequest, ChatCompletionResponse
    ),
    "/v1/completions": ("Continue a text", CompletionRequest, CompletionResponse),
    "/v1/responses": (
        "Answer a conversation, in OpenAI's newer API", ResponsesRequest, ResponsesResponse
    ),
    "/v1/embeddings": ("Texts as vectors", EmbeddingRequest, EmbeddingResponse),
    "/tokenize": ("The tokens of a text or a conversation", TokenizeRequest, TokenizeResponse),
    "/detokenize": ("The text of tokens", DetokenizeRequest, "prompt"),
    "/v1/feedback": ("Say what an answer is worth", FeedbackRequest, "object id kept"),
}  # fmt: skip
MODELS = "object status model decisions"
ADMIN: dict[str, tuple[str, type[RequestBody], str]] = {
    "/v1/admin/promote": ("Let another model answer, or the canary", PromoteRequest, MODELS),
    "/v1/admin/rollback": ("End the canary, or go back to the model before", EmptyRequest, MODELS),
}
GETS = {
    "/v1/models": ("The models that are served", "object data"),
    "/health": ("Whether the process lives", "status"),
    "/ready": ("Whether it takes requests", "status"),
    "/metrics": ("Counters for Prometheus", None),
    "/dashboard/data": (
        "What the dashboard shows", "now window since until edges groups drift alerts measures"
    ),
}  # fmt: skip
ADMIN_GETS = {"/v1/canary": ("How the canary's trial stands, and what was decided", MODELS)}
JSON = "application/json"
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STATUSES = {
    "400": "a field is wrong; the error names it",
    "401": "no key, or a wrong one",
    "403": "called by another name than its own",
    "404": "no such path or model",
    "405": "another method",
    "409": "another promotion is being made",
    "408": "the body took too long",
    "413": "the body is too long",
    "415": "the body is no JSON",
    "429": "the queue is full; Retry-After says when to try again",
    "500": "the server failed",
    "503": "the server is stopping, or the time was over before an answer began",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class _JsonSchema(GenerateJsonSchema):
    """``null`` stands for a default. No titles: they repeat the names of fields."""

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        if schema["schema"]["type"] == "nullable":
            return inner
        return {"anyOf": [inner, {"type": "null"}]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def openapi(ranks: bool, admin: bool) -> dict[str, Any]:
    """OpenAPI 3.1; ``ranks``: with the paths of /rank; ``admin``: with those that change models."""
    posts = POSTS | (rank_api.PATHS if ranks else {}) | (ADMIN if admin else {})
    models = dict.fromkeys(model for _, *both in posts.values() for model in both)
    refs, schemas = models_json_schema(
        [(model, "validation") for model in (*models, Error) if not isinstance(model, str)],
        ref_template="#/components/schemas/{model}", schema_generator=_JsonSchema,
    )  # fmt: skip
    refs = {model: ref for (model, _), ref in refs.items()}
    paths: dict[str, Any] = {}
    for path, (summary, request, response) in posts.items():
        content = {JSON: {"schema": refs[request]}}
        body = {"required": True, "content": content}
        schema = _object(response) if isinstance(response, str) else refs[response]
        paths[path] = {"post": {**_operation(path, summary, schema), "requestBody": body}}
    for path, (summary, keys) in (GETS | (ADMIN_GETS if admin else {})).items():
        schema = {"type": "string"} if keys is None else _object(keys)
        paths[path] = {"get": _operation(path, summary, schema)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastlm", "version": importlib.metadata.version("fastlm")},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _object(keys: str) -> JsonSchemaValue:
    return {"type": "object", "required": keys.split()}


def _operation(path: str, summary: str, schema: JsonSchemaValue) -> dict[str, Any]:
    """``schema``: that of the response."""
    kind = "text/plain" if schema.get("type") == "string" else JSON
    content: dict[str, Any] = {kind: {"schema": schema}}
    if path in STREAMED:
        content["text/event-stream"] = {}  # OpenAPI 3.1 cannot describe events and "[DONE]"
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, description in STATUSES.items():
        responses[status] = {"description": description, "content": error}
    if path == "/ready":
        responses["503"] = {"description": "the server is stopping", "content": content}
    return {"summary": summary, "responses": responses}
