"""``/v1/admin/promote``, ``/v1/admin/rollback`` and ``/v1/canary``, and what has no fields."""

from typing import Annotated

from pydantic import Field

from fastlm.schema import Name
from fastlm.serve.protocol.body import RequestBody

ModelPath = Annotated[Name, Field(max_length=4096)]


class EmptyRequest(RequestBody):
    pass


class PromoteRequest(RequestBody):
    """``model``: None for the canary."""

    model: ModelPath | None = None
    other_tokens: bool = False
