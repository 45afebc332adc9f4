"""The API of the page /rank: `fastlm rank judge` for a browser, on the same store."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.serve.fields import ApiError, Field, flag, list_of, name, read_fields, text, whole

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.ranking import RankingStore

MOST_ANSWERS = 64
RATER = name(128, required=True)
ITEM = Field(whole(0, 2**53).read, {"type": "integer"}, required=True)
NEXT: Mapping[str, Field] = {
    "rater": RATER,
    "after": whole(0, 2**53, 0),
    "skipped": flag(),
    "item": whole(0, 2**53),
}
JUDGE: Mapping[str, Field] = {
    "rater": RATER,
    "item": ITEM,
    # per answer as shown; none: skipped
    "ranks": list_of(whole(0, MOST_ANSWERS), 1, MOST_ANSWERS),
}
CORRECT: Mapping[str, Field] = {
    "rater": RATER,
    "item": ITEM,
    "answer": whole(0, MOST_ANSWERS, 0),
    "text": text(2**16, required=True),
}


def routes(server: "Server", store: "RankingStore") -> list[Route]:
    """The routes, on a store in which raters of other processes may work at the same time."""

    def route(name: str, fields: Mapping[str, Field], work: Callable[..., dict[str, Any]]) -> Route:
        async def answer(http: Request) -> Response:
            given = await server.body(http, partial(read_fields, fields=fields))
            try:
                return JSONResponse(await run_sync(partial(work, store, **given)))
            except InputError as error:
                raise ApiError(str(error)) from None

        return Route(f"/v1/rank/{name}", answer, methods=["POST"])

    return [
        route("next", NEXT, _next),
        route("judge", JUDGE, _judge),
        route("correct", CORRECT, _correct),
        route("agreement", {}, _agreement),
    ]


def _next(
    store: "RankingStore", rater: str, after: int, skipped: bool, item: int | None
) -> dict[str, Any]:
    """The next item for a rater, or the one that is asked for, with how far the rater is."""
    if item is not None:
        found = store.item(item, rater)
    else:
        found = store.next_item(rater, after=after, skipped=skipped)
    counts, total = store.progress(rater)
    shown = None
    if found is not None:
        shown = {key: getattr(found, key) for key in ("id", "prompt", "tools", "answers")}
    return {"item": shown, "progress": {**asdict(counts), "total": total}}


def _judge(store: "RankingStore", rater: str, item: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    found = store.item(item, rater)
    if ranks:
        store.rank(rater, found, ranks)
    else:
        store.skip(rater, found)
    return {"item": item, "skipped": not ranks}


def _correct(
    store: "RankingStore", rater: str, item: int, answer: int, text: str
) -> dict[str, Any]:
    found = store.item(item, rater)
    if answer >= len(found.answers):
        raise InputError(f"answer: wanted one below {len(found.answers)}, got {answer}")
    store.correct(rater, found, answer, text)
    return {"item": item, "answer": answer}


def _agreement(store: "RankingStore") -> dict[str, Any]:
    have = asdict(store.agreement())
    have["alpha"] = None if math.isnan(have["alpha"]) else have["alpha"]
    return {**have, "raters": {name: asdict(n) for name, n in store.raters().items()}}
