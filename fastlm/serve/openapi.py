"""The API's description for /openapi.json, made from the models of requests and responses."""

import importlib.metadata
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from fastlm.serve import rank_api
from fastlm.serve.admin_api import PromoteRequest
from fastlm.serve.protocol.body import EmptyRequest, RequestBody
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest
from fastlm.serve.protocol.embedding import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from fastlm.serve.protocol.feedback_request import FeedbackRequest
from fastlm.serve.protocol.responses_api import ResponsesRequest

# path: what it does, its request, and the keys of its response
Described = tuple[str, type[RequestBody], str]
ANSWER = "id object created model choices usage"
POSTS: dict[str, Described] = {
    "/v1/chat/completions": ("Answer a conversation", ChatCompletionRequest, ANSWER),
    "/v1/completions": ("Continue a text", CompletionRequest, ANSWER),
    "/v1/responses": (
        "Answer a conversation, in OpenAI's newer API", ResponsesRequest,
        "id object created_at status model output usage",
    ),
    "/v1/embeddings": ("Texts as vectors", EmbeddingRequest, "object data model usage"),
    "/tokenize": (
        "The tokens of a text or a conversation", TokenizeRequest,
        "count max_model_len tokens token_strs",
    ),
    "/detokenize": ("The text of tokens", DetokenizeRequest, "prompt"),
    "/v1/feedback": ("Say what an answer is worth", FeedbackRequest, "object id kept"),
}  # fmt: skip
MODELS = "object status model decisions"
ADMIN: dict[str, Described] = {
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


def _object(keys: str, **properties: Any) -> JsonSchemaValue:
    return {"type": "object", "required": keys.split(), "properties": properties}


ERROR = _object("error", error=_object("message type param code"))


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
    requests = dict.fromkeys(request for _, request, _ in posts.values())
    refs, schemas = models_json_schema(
        [(request, "validation") for request in requests],
        ref_template="#/components/schemas/{model}", schema_generator=_JsonSchema,
    )  # fmt: skip
    paths: dict[str, Any] = {}
    for path, (summary, request, keys) in posts.items():
        content = {JSON: {"schema": refs[request, "validation"]}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {**_operation(path, summary, keys), "requestBody": body}}
    for path, (summary, keys) in (GETS | (ADMIN_GETS if admin else {})).items():
        paths[path] = {"get": _operation(path, summary, keys)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastlm", "version": importlib.metadata.version("fastlm")},
        "paths": paths,
        "components": {"schemas": schemas["$defs"] | {"Error": ERROR}},
    }


def _operation(path: str, summary: str, keys: str | None) -> dict[str, Any]:
    """``keys``: of the response; None: it is a text."""
    schema = {"type": "string"} if keys is None else _object(keys)
    content: dict[str, Any] = {"text/plain" if keys is None else JSON: {"schema": schema}}
    if path in STREAMED:
        content["text/event-stream"] = {}  # OpenAPI 3.1 cannot describe events and "[DONE]"
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, description in STATUSES.items():
        responses[status] = {"description": description, "content": error}
    if path == "/ready":
        responses["503"] = {"description": "the server is stopping", "content": content}
    return {"summary": summary, "responses": responses}
