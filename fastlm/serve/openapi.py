"""Generate the API's description for /openapi.json from the models of requests."""

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

# summary, model of the request, and keys of the response
Endpoint = tuple[str, type[RequestBody], str]
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
GETS = {
    "/v1/models": ("List the models", "object data"),
    "/health": ("Tell whether the process runs", "status"),
    "/ready": ("Tell whether the server accepts requests", "status"),
    "/metrics": ("Return metrics for Prometheus", None),
    "/dashboard/data": (
        "Return the data of the dashboard",
        "now window since until edges groups drift alerts measurements"
    ),
}  # fmt: skip
ADMIN_GETS = {"/v1/canary": ("Return the state of the canary and the decisions", MANAGER_KEYS)}
JSON = "application/json"
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STATUSES = {
    "400": "a field is wrong; the error names it",
    "401": "the key is missing or wrong",
    "403": "the host name is not allowed",
    "404": "the path or the model is unknown",
    "405": "the method is not allowed",
    "409": "another promotion is in progress",
    "408": "the body arrived too slowly",
    "413": "the body is too long",
    "415": "the body is not JSON",
    "429": "the queue is full; Retry-After says when to try again",
    "500": "the server failed",
    "503": "the server is stopping, or the time limit ended before an answer began",
}


def _object(keys: str, **properties: Any) -> JsonSchemaValue:
    return {"type": "object", "required": keys.split(), "properties": properties}


ERROR = _object("error", error=_object("message type param code"))


class _JsonSchema(GenerateJsonSchema):
    """Generates schemas in which ``null`` means the default, without titles, which would repeat the
    names of fields."""

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        if schema["schema"]["type"] == "nullable":
            return inner
        return {"anyOf": [inner, {"type": "null"}]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def openapi(ranks: bool, admin: bool) -> dict[str, Any]:
    """Return the description in OpenAPI 3.1. ``ranks``: include the paths of /rank. ``admin``:
    include the paths that change models."""
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
    """Describe an operation. ``keys``: those of the response; None: it is a text."""
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
