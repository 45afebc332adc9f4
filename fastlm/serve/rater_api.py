"""What the APIs of the raters' pages share: `fastlm.serve.rank_api`, `fastlm.serve.label_api`."""

from collections.abc import Callable, Mapping
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
from fastlm.serve.openapi import Endpoint

if TYPE_CHECKING:
    from fastlm.serve.http_server import HttpServer

Rater = Annotated[Name, Field(max_length=128)]
Handler = Callable[[Any, Any], dict[str, Any]]  # (store, request) -> response


def rater_routes(
    server: "HttpServer", store: Any, paths: Mapping[str, Endpoint], handlers: Mapping[str, Handler]
) -> list[Route]:
    """Return a route for each of the ``paths``; its handler runs in a thread."""

    def route(path: str, handler: Handler) -> Route:
        async def answer(http: Request) -> Response:
            request = await server.parse_body(http, paths[path][1])
            try:
                return JSONResponse(await run_sync(partial(handler, store, request)))
            except InputError as error:
                raise ApiError(str(error)) from None

        return Route(path, answer, methods=["POST"])

    return [route(path, handlers[path]) for path in paths]
