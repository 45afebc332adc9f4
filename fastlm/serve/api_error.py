"""A refused request, in the shape that OpenAI's errors have."""

from collections.abc import Mapping
from typing import Any

from fastlm.errors import InputError


class ApiError(InputError):
    """A refused request. ``param``: the field at fault; ``kind``: OpenAI's type of the error."""

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
