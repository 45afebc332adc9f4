"""Routes for administrators: promote a model, roll back, and show the state of a canary.

They accept connections from this machine only and, if the server has API keys, admin keys only.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastlm.errors import InputError
from fastlm.schema import Name
from fastlm.serve.api_error import ApiError
from fastlm.serve.middleware import key_name
from fastlm.serve.protocol.body import EmptyRequest, RequestBody

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.model_manager import ModelManager


class PromoteRequest(RequestBody):
    """The body of a promotion. ``model``: its path; None means the canary."""

    model: Annotated[Name, Field(max_length=4096)] | None = None
    allow_other_tokenizer: bool = False


PATHS = ("/v1/admin/promote", "/v1/admin/rollback", "/v1/canary")


def routes(server: "Server", manager: "ModelManager", admin_keys: Sequence[str]) -> list[Route]:
    """Return the routes; with keys, only clients with an admin key may use them."""
    names = [key_name(key) for key in admin_keys]

    def check_admin(http: Request) -> None:
        try:
            is_local = ipaddress.ip_address(http.client.host if http.client else "").is_loopback
        except ValueError:
            is_local = False
        if not is_local:
            raise _not_admin("expected a connection from this machine")
        if server.keys and sum(hmac.compare_digest(http.state.client, n) for n in names) == 0:
            raise _not_admin("expected an admin key of this server (--admin-key-file)")

    async def promote(http: Request) -> Response:
        check_admin(http)
        request = await server.parse_body(http, PromoteRequest)
        return await run_change(
            manager.promote(request.model, allow_other_tokenizer=request.allow_other_tokenizer)
        )

    async def rollback(http: Request) -> Response:
        check_admin(http)
        await server.parse_body(http, EmptyRequest)
        return await run_change(manager.rollback())

    async def canary(http: Request) -> Response:
        check_admin(http)
        return JSONResponse(await manager.status())

    async def run_change(change: Awaitable[None]) -> Response:
        try:
            await change
        except ApiError:
            raise
        except InputError as error:
            raise ApiError(str(error), param="model", code="not_promoted") from None
        return JSONResponse(await manager.status())

    handlers = ((promote, "POST"), (rollback, "POST"), (canary, "GET"))
    return [
        Route(path, handler, methods=[method]) for path, (handler, method) in zip(PATHS, handlers)
    ]


def _not_admin(message: str) -> ApiError:
    return ApiError(f"authorization: {message}", status=403, code="not_admin")
