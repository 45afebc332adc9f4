"""What the APIs of people's judgements share: `fastlm.serve.feedback_api` and those of the raters'
pages, `fastlm.serve.rank_api` and `fastlm.serve.label_api`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError, StorageError
from fastlm.pipeline.rater_terminal import check_rater
from fastlm.serve.api_error import ApiError
from fastlm.serve.openapi import Endpoint
from fastlm.serve.protocol.feedback_request import CLIENT

if TYPE_CHECKING:
    from fastlm.serve.http_server import HttpServer

Handler = Callable[[Any, Any], dict[str, Any]]  # (store, request) -> response


def rater_routes(
    server: "HttpServer", store: Any, paths: Mapping[str, Endpoint], handlers: Mapping[str, Handler]
) -> list[Route]:
    """Return a route for each of the ``paths``; its handler runs in a thread."""

    def route(path: str, handler: Handler) -> Route:
        async def answer(http: Request) -> Response:
            request = await server.parse_body(http, paths[path][1])
            name = getattr(request, "rater", None)
            try:
                if len(server.keys) > 1 and name is not None:
                    check_rater(name)
                    rater = rater_of(http.state.client, name)
                    request = request.model_copy(update={"rater": rater})
                return JSONResponse(await run_sync(partial(handler, store, request)))
            except StorageError:
                raise unavailable("store") from None
            except InputError as error:
                raise ApiError(str(error)) from None

        return Route(path, answer, methods=["POST"])

    return [route(path, handlers[path]) for path in paths]


def rater_of(client: str, name: str | None) -> str:
    """Return the stored name of a rater if there are several keys, so that nobody can be a rater of
    another key: letters of the key's hash, and the name of the request. ``client``: that hash in
    hexadecimal digits.
    """
    letters = "".join(chr(ord("a") + int(digit, 16)) for digit in client[:CLIENT])
    return f"{letters}:{name or ''}"


def unavailable(name: str) -> ApiError:
    """Return the error of a store that cannot be used now, without its address."""
    return ApiError(
        f"{name} cannot be used; try again", status=503, kind="server_error", code="no_database",
        headers={"retry-after": "5"},
    )  # fmt: skip
