"""Generate the API's description for /openapi.json from the models of requests."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from fastlm.serve.protocol.body import RequestBody

# summary, model of the request, and keys of the response
Endpoint = tuple[str, type[RequestBody], str]
GETS: dict[str, tuple[str, str | None]] = {  # of all servers
    "/health": ("Tell whether the process runs", "status"),
    "/ready": ("Tell whether the server accepts requests", "status"),
    "/metrics": ("Return metrics for Prometheus", None),
    "/version": ("Return the version of fastlm", "version"),
}
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


def openapi(
    posts: Mapping[str, Endpoint], gets: Mapping[str, tuple[str, str | None]]
) -> dict[str, Any]:
    """Return the description in OpenAPI 3.1. ``gets``: path -> a summary, and the keys of the
    response; None: it is a text."""
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
    for path, (summary, keys) in {**gets, **GETS}.items():
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
