"""The API's description for /openapi.json, made from the tables that check requests."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from fastlm.serve import admin_api, openai_api, opinions, rank_api, responses_api, tokens_api
from fastlm.serve.fields import Field, schema_of

POSTS: dict[str, tuple[str, Mapping[str, Field]]] = {
    "/v1/chat/completions": ("Answer a conversation", openai_api.CHAT),
    "/v1/completions": ("Continue a text", openai_api.TEXT),
    "/v1/responses": ("Answer a conversation, in OpenAI's newer API", responses_api.RESPONSES),
    "/v1/embeddings": ("Texts as vectors", openai_api.EMBED),
    "/tokenize": ("The tokens of a text or a conversation", tokens_api.TOKENIZE),
    "/detokenize": ("The text of tokens", tokens_api.DETOKENIZE),
    "/v1/feedback": ("Say what an answer is worth", opinions.FEEDBACK),
}
RANKS: dict[str, tuple[str, Mapping[str, Field]]] = {
    "/v1/rank/next": ("The next item to rank", rank_api.NEXT),
    "/v1/rank/judge": ("Rank an item, or skip it", rank_api.JUDGE),
    "/v1/rank/correct": ("Correct an answer", rank_api.CORRECT),
    "/v1/rank/agreement": ("How far raters agree", {}),
}
ADMIN: dict[str, tuple[str, Mapping[str, Field]]] = {
    "/v1/admin/promote": ("Let another model answer, or the canary", admin_api.PROMOTE),
    "/v1/admin/rollback": ("End the canary, or go back to the model before", {}),
}
GETS = {
    "/v1/models": "The models that are served",
    "/health": "Whether the process lives",
    "/ready": "Whether it takes requests",
    "/metrics": "Counters for Prometheus",
    "/dashboard/data": "What the dashboard shows",
}
ADMIN_GETS = {"/v1/canary": "How the canary's trial stands, and what was decided"}
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
ANSWERS = {  # what a 200 has
    "/v1/chat/completions": "id object created model choices usage",
    "/v1/completions": "id object created model choices usage",
    "/v1/responses": "id object created_at status model output usage",
    "/v1/embeddings": "object data model usage",
    "/tokenize": "count max_model_len tokens token_strs",
    "/detokenize": "prompt",
    "/v1/feedback": "object id kept",
    "/v1/rank/next": "item progress",
    "/v1/rank/judge": "item skipped",
    "/v1/rank/correct": "item answer",
    "/v1/rank/agreement": "alpha raters",
    "/v1/admin/promote": "object status model decisions",
    "/v1/admin/rollback": "object status model decisions",
    "/v1/canary": "object status model decisions",
    "/v1/models": "object data",
    "/health": "status",
    "/ready": "status",
    "/dashboard/data": "now window since until edges groups drift alerts measures",
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAY_BE_NULL = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": MAY_BE_NULL, "code": MAY_BE_NULL,
            },
        }
    },
}  # fmt: skip
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


def openapi(ranks: bool, admin: bool) -> dict[str, Any]:
    """OpenAPI 3.1; ``ranks``: with the paths of /rank; ``admin``: with those that change models."""
    paths: dict[str, Any] = {}
    posts = POSTS | (RANKS if ranks else {}) | (ADMIN if admin else {})
    for path, (summary, fields) in posts.items():
        body = {"required": True, "content": {"application/json": {"schema": schema_of(fields)}}}
        paths[path] = {"post": {**_operation(path, summary), "requestBody": body}}
    for path, summary in (GETS | (ADMIN_GETS if admin else {})).items():
        paths[path] = {"get": _operation(path, summary)}
    version = importlib.metadata.version("fastlm")
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastlm", "version": version},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}},
    }


def _operation(path: str, summary: str) -> dict[str, Any]:
    content: dict[str, Any] = {TEXT: {"schema": {"type": "string"}}}
    if path in ANSWERS:
        content = {JSON: {"schema": {"type": "object", "required": ANSWERS[path].split()}}}
    if path in STREAMED:
        content[EVENTS] = {}  # OpenAPI 3.1 cannot describe a stream of events and "[DONE]"
    told: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, text in STATUSES.items():
        told[status] = {"description": text, "content": error}
    if path == "/ready":
        told["503"] = {"description": "the server is stopping", "content": content}
    return {"summary": summary, "responses": told}
