"""The API's description for /openapi.json, made from the tables that check requests."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from fastlm.serve import openai_api, opinions, rank_api
from fastlm.serve.fields import Field, schema_of

POSTS: dict[str, tuple[str, Mapping[str, Field]]] = {
    "/v1/chat/completions": ("Answer a conversation", openai_api.CHAT),
    "/v1/completions": ("Continue a text", openai_api.TEXT),
    "/v1/embeddings": ("Texts as vectors", openai_api.EMBED),
    "/v1/feedback": ("Say what an answer is worth", opinions.FEEDBACK),
}
RANKS: dict[str, tuple[str, Mapping[str, Field]]] = {
    "/v1/rank/next": ("The next item to rank", rank_api.NEXT),
    "/v1/rank/judge": ("Rank an item, or skip it", rank_api.JUDGE),
    "/v1/rank/correct": ("Correct an answer", rank_api.CORRECT),
    "/v1/rank/agreement": ("How far raters agree", {}),
}
GETS = {
    "/v1/models": "The model that is served",
    "/health": "Whether the process lives",
    "/ready": "Whether it takes requests",
    "/metrics": "Counters for Prometheus",
}
STATUSES = {
    "400": "a field is wrong; the error names it",
    "401": "no key, or a wrong one",
    "403": "called by another name than its own",
    "404": "no such path or model",
    "405": "another method",
    "408": "the body took too long",
    "413": "the body is too long",
    "415": "the body is no JSON",
    "429": "the queue is full; Retry-After says when to try again",
    "500": "the server failed",
    "503": "the server is stopping, or the time was over before an answer began",
}


def openapi(ranks: bool) -> dict[str, Any]:
    """OpenAPI 3.1; ``ranks``: with the paths of /rank."""
    paths: dict[str, Any] = {}
    for path, (summary, fields) in (POSTS | (RANKS if ranks else {})).items():
        body = {"required": True, "content": {"application/json": {"schema": schema_of(fields)}}}
        paths[path] = {"post": {**_operation(summary), "requestBody": body}}
    for path, summary in GETS.items():
        paths[path] = {"get": _operation(summary)}
    version = importlib.metadata.version("fastlm")
    return {"openapi": "3.1.0", "info": {"title": "fastlm", "version": version}, "paths": paths}


def _operation(summary: str) -> dict[str, Any]:
    told = {"200": {"description": "OK"}}
    told |= {status: {"description": text} for status, text in STATUSES.items()}
    return {"summary": summary, "responses": told}
