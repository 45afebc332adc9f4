"""The API's description for /openapi.json, made from the models of requests and responses."""

import importlib.metadata
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from fastlm.serve import rank_api
from fastlm.serve.protocol import admin_request as admin
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest, ChatCompletionResponse
from fastlm.serve.protocol.completion import CompletionRequest, CompletionResponse
from fastlm.serve.protocol.embedding import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from fastlm.serve.protocol.feedback_request import FeedbackRequest, FeedbackResponse
from fastlm.serve.protocol.responses_api import ResponsesRequest, ResponsesResponse


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Status(BaseModel):
    status: str


class ModelList(BaseModel):
    object: str
    data: list[dict[str, Any]]


class DashboardData(BaseModel):
    now: Any
    window: Any
    since: Any
    until: Any
    edges: Any
    groups: Any
    drift: Any
    alerts: Any
    measures: Any


# path: what it does, its request and its response
Paths = dict[str, tuple[str, type[BaseModel], type[BaseModel]]]
POSTS: Paths = {
    "/v1/chat/completions": (
        "Answer a conversation", ChatCompletionRequest, ChatCompletionResponse
    ),
    "/v1/completions": ("Continue a text", CompletionRequest, CompletionResponse),
    "/v1/responses": (
        "Answer a conversation, in OpenAI's newer API", ResponsesRequest, ResponsesResponse
    ),
    "/v1/embeddings": ("Texts as vectors", EmbeddingRequest, EmbeddingResponse),
    "/tokenize": ("The tokens of a text or a conversation", TokenizeRequest, TokenizeResponse),
    "/detokenize": ("The text of tokens", DetokenizeRequest, DetokenizeResponse),
    "/v1/feedback": ("Say what an answer is worth", FeedbackRequest, FeedbackResponse),
}  # fmt: skip
ADMIN: Paths = {
    "/v1/admin/promote": (
        "Let another model answer, or the canary", admin.PromoteRequest, admin.ServedModels
    ),
    "/v1/admin/rollback": (
        "End the canary, or go back to the model before", admin.EmptyRequest, admin.ServedModels
    ),
}  # fmt: skip
GETS: dict[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/models": ("The models that are served", ModelList),
    "/health": ("Whether the process lives", Status),
    "/ready": ("Whether it takes requests", Status),
    "/metrics": ("Counters for Prometheus", None),
    "/dashboard/data": ("What the dashboard shows", DashboardData),
}
ADMIN_GETS: dict[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/canary": ("How the canary's trial stands, and what was decided", admin.ServedModels)
}
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
    gets = GETS | (ADMIN_GETS if admin else {})
    models = [(request, "validation") for _, request, _ in posts.values()]
    models += [(response, "serialization") for _, _, response in posts.values()]
    models += [(response, "serialization") for _, response in gets.values() if response]
    refs, schemas = models_json_schema(
        [*dict.fromkeys(models), (Error, "serialization")],  # type: ignore[list-item]
        ref_template="#/components/schemas/{model}", schema_generator=_JsonSchema,
    )  # fmt: skip
    paths: dict[str, Any] = {}
    for path, (summary, request, response) in posts.items():
        operation = _operation(path, summary, refs[response, "serialization"])
        content = {"application/json": {"schema": refs[request, "validation"]}}
        paths[path] = {"post": {**operation, "requestBody": {"required": True, "content": content}}}
    for path, (summary, response) in gets.items():
        schema = refs[response, "serialization"] if response else None
        paths[path] = {"get": _operation(path, summary, schema)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastlm", "version": importlib.metadata.version("fastlm")},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _operation(path: str, summary: str, schema: JsonSchemaValue | None) -> dict[str, Any]:
    """``schema``: that of the response; None: it is plain text."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if schema is None:
        content = {"text/plain": {"schema": {"type": "string"}}}
    if path in STREAMED:
        content["text/event-stream"] = {}  # OpenAPI 3.1 cannot describe events and "[DONE]"
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, description in STATUSES.items():
        responses[status] = {"description": description, "content": error}
    if path == "/ready":
        responses["503"] = {"description": "the server is stopping", "content": content}
    return {"summary": summary, "responses": responses}
