"""Serve the API of the page /rank: `fastlm rank judge` for a browser, on the same store."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.serve.openapi import Endpoint
from fastlm.serve.protocol.body import INTEGER, EmptyRequest, RequestBody
from fastlm.serve.protocol.feedback_request import Rater
from fastlm.serve.rater_api import rater_routes

if TYPE_CHECKING:
    from fastlm.serve.http_server import HttpServer
    from fastlm.serve.ranking import RankingStore

MAX_ANSWERS = 64
ItemId = Annotated[int, Field(ge=0, le=2**53), INTEGER]
Rank = Annotated[int, Field(ge=0, le=MAX_ANSWERS), INTEGER]


class NextRequest(RequestBody):
    rater: Rater
    after: ItemId = 0
    skipped: bool = False
    item: ItemId | None = None


class JudgeRequest(RequestBody):
    """``ranks``: of the answers as shown; none: the item is skipped."""

    rater: Rater
    item: ItemId
    ranks: Annotated[list[Rank], Field(min_length=1, max_length=MAX_ANSWERS)] = []


class CorrectRequest(RequestBody):
    rater: Rater
    item: ItemId
    answer: Rank = 0
    text: Annotated[str, Field(min_length=1, max_length=2**16)]


PATHS: dict[str, Endpoint] = {
    "/v1/rank/next": ("The next item to rank", NextRequest, "item progress"),
    "/v1/rank/judge": ("Rank an item, or skip it", JudgeRequest, "item skipped"),
    "/v1/rank/correct": ("Correct an answer", CorrectRequest, "item answer"),
    "/v1/rank/agreement": ("How far raters agree", EmptyRequest, "alpha raters"),
}


def routes(server: "HttpServer", store: "RankingStore") -> list[Route]:
    """Return the routes. Raters in other processes may use the store at the same time."""
    handlers = (_next, _judge, _correct, _agreement)
    return rater_routes(server, store, PATHS, dict(zip(PATHS, handlers, strict=True)))


def _next(store: "RankingStore", request: NextRequest) -> dict[str, Any]:
    """Return the next item for a rater, or the one of the request, and the rater's progress."""
    rater = request.rater
    if request.item is not None:
        item = store.item(request.item, rater)
    else:
        item = store.next_item(rater, after=request.after, skipped=request.skipped)
    counts, total = store.progress(rater)
    fields = None
    if item is not None:
        fields = {key: getattr(item, key) for key in ("id", "prompt", "tools", "answers")}
    return {"item": fields, "progress": {**asdict(counts), "total": total}}


def _judge(store: "RankingStore", request: JudgeRequest) -> dict[str, Any]:
    item = store.item(request.item, request.rater)
    if request.ranks:
        store.rank(request.rater, item, request.ranks)
    else:
        store.skip(request.rater, item)
    return {"item": request.item, "skipped": not request.ranks}


def _correct(store: "RankingStore", request: CorrectRequest) -> dict[str, Any]:
    item = store.item(request.item, request.rater)
    if request.answer >= len(item.answers):
        raise InputError(f"answer: expected one below {len(item.answers)}, got {request.answer}")
    store.correct(request.rater, item, request.answer, request.text)
    return {"item": request.item, "answer": request.answer}


def _agreement(store: "RankingStore", _: EmptyRequest) -> dict[str, Any]:
    return store.agreement_report()
