"""Routes for whoever runs the server: promote a model, roll back, and how a canary is doing.

They answer this machine alone, and where the server has API keys, to an admin key alone.
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
    """``model``: None for the canary."""

    model: Annotated[Name, Field(max_length=4096)] | None = None
    allow_other_tokenizer: bool = False


PATHS = ("/v1/admin/promote", "/v1/admin/rollback", "/v1/canary")


def routes(server: "Server", manager: "ModelManager", admins: Sequence[str]) -> list[Route]:
    """``admins``: the admin keys."""
    names = [key_name(key) for key in admins]

    def admit(http: Request) -> None:
        try:
            here = ipaddress.ip_address(http.client.host if http.client else "").is_loopback
        except ValueError:
            here = False
        if not here:
            raise _refused("expected a connection from this machine")
        if server.keys and sum(hmac.compare_digest(http.state.client, n) for n in names) == 0:
            raise _refused("expected an admin key of this server (--admin-key-file)")

    async def promote(http: Request) -> Response:
        admit(http)
        request = await server.body(http, PromoteRequest)
        return await done(
            manager.promote(request.model, allow_other_tokenizer=request.allow_other_tokenizer)
        )

    async def rollback(http: Request) -> Response:
        admit(http)
        await server.body(http, EmptyRequest)
        return await done(manager.rollback())

    async def canary(http: Request) -> Response:
        admit(http)
        return JSONResponse(await manager.status())

    async def done(work: Awaitable[None]) -> Response:
        try:
            await work
        except ApiError:
            raise
        except InputError as error:
            raise ApiError(str(error), param="model", code="not_promoted") from None
        return JSONResponse(await manager.status())

    ways = ((promote, "POST"), (rollback, "POST"), (canary, "GET"))
    return [Route(path, way, methods=[m]) for path, (way, m) in zip(PATHS, ways)]


def _refused(text: str) -> ApiError:
    return ApiError(f"authorization: {text}", status=403, code="not_admin")
