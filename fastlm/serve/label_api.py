"""Serve the API of the page of ``fastlm label``: the terminal's loop for a browser, on the same
store."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from starlette.routing import Route

from fastlm.serve.openapi import Endpoint
from fastlm.serve.protocol.body import INTEGER, RequestBody
from fastlm.serve.protocol.feedback_request import Rater
from fastlm.serve.rater_api import rater_routes

if TYPE_CHECKING:
    from fastlm.evals.judge.label_store import LabelStore
    from fastlm.serve.http_server import HttpServer

ItemId = Annotated[str, Field(min_length=1, max_length=128)]


class NextLabelRequest(RequestBody):
    rater: Rater
    item: ItemId | None = None


class LabelRequest(RequestBody):
    """``label``: of a pair, A is the answer that is shown first. None: the item is skipped."""

    rater: Rater
    item: ItemId
    label: Annotated[int, INTEGER] | Annotated[str, Field(max_length=16)] | None = None


PATHS: dict[str, Endpoint] = {
    "/v1/label/next": ("The next answer to label", NextLabelRequest, "item progress rubric"),
    "/v1/label/label": ("Label an answer, or skip it", LabelRequest, "item skipped"),
}


def routes(server: "HttpServer", store: "LabelStore") -> list[Route]:
    """Return the routes."""
    handlers = (_next, _label)
    return rater_routes(server, store, PATHS, dict(zip(PATHS, handlers, strict=True)))


def _next(store: "LabelStore", request: NextLabelRequest) -> dict[str, Any]:
    """Return the next item for a rater, or the one of the request, the rater's progress, and the
    rubric. No field tells what the judge said."""
    rater = request.rater
    counts, total = store.progress(rater)
    item = store.next_item(rater) if request.item is None else store.item(request.item, rater)
    fields = None
    if item is not None:
        fields = {key: getattr(item, key) for key in ("id", "prompt", "answers")}
    rubric = {"scale": store.rubric.scale, "text": store.rubric.text}
    return {"item": fields, "progress": {**asdict(counts), "total": total}, "rubric": rubric}


def _label(store: "LabelStore", request: LabelRequest) -> dict[str, Any]:
    item = store.item(request.item, request.rater)
    if request.label is None:
        store.skip(request.rater, item)
    else:
        store.label(request.rater, item, request.label)
    return {"item": request.item, "skipped": request.label is None}
