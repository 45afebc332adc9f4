"""``GET /dashboard/data``: what the page /dashboard shows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fastlm.errors import InputError
from fastlm.serve.api_error import ApiError

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.monitor.monitor import Monitor
    from fastlm.serve.monitor.prompts_drift import Reference

NAMES = ("window", "begin", "end")


async def data(server: "Server", http: Request) -> Response:
    """The data of a window: hour, day, week or all. ``begin``, ``end``: another reference for
    drift.
    """
    monitor = server.monitor
    if monitor is None:
        raise ApiError(
            "dashboard: this server has no database for it (fastlm serve --feedback)",
            status=404, code="no_feedback",
        )  # fmt: skip
    name, reference = asked(http.query_params)
    return JSONResponse(await run_sync(_read, monitor, name, reference, limiter=server.looking))


def asked(query: Mapping[str, str]) -> tuple[str, "Reference | None"]:
    """The window, and the reference where the query names one. ApiError: names what is wrong."""
    from fastlm.serve.monitor.monitor import WINDOWS  # not at the top: SQLAlchemy takes 0.2 s
    from fastlm.serve.monitor.prompts_drift import Reference

    for key in query:
        if key not in NAMES:
            raise ApiError(f"{key:.80}: wanted one of {', '.join(NAMES)}", param=key[:80])
    name = query.get("window", "day")
    if name not in WINDOWS:
        raise ApiError(
            f"window: wanted one of {', '.join(WINDOWS)}, got {name!r:.80}", param="window"
        )
    if not query.get("begin") and not query.get("end"):
        return name, None
    try:
        return name, Reference(begin=query.get("begin", ""), end=query.get("end", ""))
    except InputError as error:
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None


def _read(monitor: "Monitor", name: str, reference: "Reference | None") -> dict[str, object]:
    try:
        return monitor.data(name, reference)
    except InputError:
        raise ApiError(
            "dashboard: the database cannot be used; try again", status=503, kind="server_error",
            code="no_database", headers={"retry-after": "5"},
        ) from None  # fmt: skip
