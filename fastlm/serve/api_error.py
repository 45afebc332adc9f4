"""Errors of the API, in OpenAI's format."""

from collections.abc import Mapping
from typing import Any

from fastlm.errors import InputError


class ApiError(InputError):
    """An error response. ``param``: the field at fault. ``kind``: OpenAI's type of the error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def field_error(param: str, message: str, code: str | None = None) -> ApiError:
    """Return a 400 for a field; its message is ``param: message``."""
    return ApiError(f"{param}: {message}", param=param, code=code)


def server_error(
    message: str, status: int = 500, *, param: str | None = None, code: str | None = None
) -> ApiError:
    """Return an error that the request did not cause. A 503 with a ``code`` has Retry-After."""
    headers = {"retry-after": "5"} if status == 503 and code is not None else None
    return ApiError(
        message, status=status, param=param, code=code, kind="server_error", headers=headers
    )


def stopping() -> ApiError:
    """Return the 503 of a server that is shutting down."""
    return server_error("the server is stopping", 503, code="stopping")
