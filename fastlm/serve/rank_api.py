"""The API of the page /rank: `fastlm rank judge` for a browser, on the same store."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.schema import Name
from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.body import WHOLE, EmptyRequest, RequestBody
from fastlm.serve.ranking import Item, RankingStore, check_rater

if TYPE_CHECKING:
    from fastlm.serve.app import Server

MAX_ANSWERS = 64
Rater = Annotated[Name, Field(max_length=128)]
ItemId = Annotated[int, Field(ge=0, le=2**53), WHOLE]
Rank = Annotated[int, Field(ge=0, le=MAX_ANSWERS), WHOLE]


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


def routes(server: "Server", path_of_store: Path) -> list[Route]:
    """The routes, on the store at this path. Each request opens the store: raters of other
    processes work on it at the same time.
    """

    def route(path: str, work: Callable[..., dict[str, Any]]) -> Route:
        def locked(request: RequestBody) -> dict[str, Any]:
            with RankingStore(path_of_store) as store:
                return work(store, request)

        async def answer(http: Request) -> Response:
            request = await server.body(http, PATHS[path][1])
            try:
                return JSONResponse(await run_sync(locked, request))
            except InputError as error:
                raise ApiError(str(error)) from None

        return Route(path, answer, methods=["POST"])

    return [route(path, work) for path, work in zip(PATHS, (_next, _judge, _correct, _agreement))]


def _next(store: RankingStore, request: NextRequest) -> dict[str, Any]:
    """The next item for a rater, or the one that is asked for, with how far the rater is."""
    rater = request.rater
    check_rater(rater)
    if request.item is not None:
        item = store.item(request.item, rater)
    else:
        item = store.next_item(rater, after=request.after, skipped=request.skipped)
    counts, total = store.progress(rater)
    shown = None if item is None else _shown(item)
    return {"item": shown, "progress": {**asdict(counts), "total": total}}


def _judge(store: RankingStore, request: JudgeRequest) -> dict[str, Any]:
    item = store.item(request.item, request.rater)
    if request.ranks:
        store.judge(request.rater, item, tuple(request.ranks))
    else:
        store.skip(request.rater, item)
    return {"item": request.item, "skipped": not request.ranks}


def _correct(store: RankingStore, request: CorrectRequest) -> dict[str, Any]:
    item, answer = store.item(request.item, request.rater), request.answer
    if answer >= len(item.answers):
        raise InputError(f"answer: expected one below {len(item.answers)}, got {answer}")
    store.correct(request.rater, item, item.answers[answer], request.text)
    return {"item": request.item, "answer": answer}


def _agreement(store: RankingStore, _: EmptyRequest) -> dict[str, Any]:
    have = asdict(store.agreement())
    have["alpha"] = None if math.isnan(have["alpha"]) else have["alpha"]
    return {**have, "raters": {name: asdict(n) for name, n in store.raters().items()}}


def _shown(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "prompt": item.prompt,
        "tools": item.tools,
        "answers": [answer.messages for answer in item.answers],
    }
