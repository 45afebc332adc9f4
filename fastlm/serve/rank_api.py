"""Serve the API of the page /rank: `fastlm rank judge` for a browser, on the same store."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.schema import Name
from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.body import INTEGER, EmptyRequest, RequestBody

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.ranking import RankingStore

MAX_ANSWERS = 64
Rater = Annotated[Name, Field(max_length=128)]
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


PATHS: dict[str, tuple[str, type[RequestBody], str]] = {  # summary, request, keys of the response
    "/v1/rank/next": ("The next item to rank", NextRequest, "item progress"),
    "/v1/rank/judge": ("Rank an item, or skip it", JudgeRequest, "item skipped"),
    "/v1/rank/correct": ("Correct an answer", CorrectRequest, "item answer"),
    "/v1/rank/agreement": ("How far raters agree", EmptyRequest, "alpha raters"),
}


def routes(server: "Server", store: "RankingStore") -> list[Route]:
    """Return the routes. Raters in other processes may use the store at the same time."""

    def route(path: str, handler: Callable[..., dict[str, Any]]) -> Route:
        async def answer(http: Request) -> Response:
            request = await server.parse_body(http, PATHS[path][1])
            try:
                return JSONResponse(await run_sync(partial(handler, store, request)))
            except InputError as error:
                raise ApiError(str(error)) from None

        return Route(path, answer, methods=["POST"])

    return [
        route(path, handler) for path, handler in zip(PATHS, (_next, _judge, _correct, _agreement))
    ]


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
