"""The base class of requests, the types of their fields, and the parser of a body.

Types are strict: a text is no number, and a number is no boolean. A field that the server does not
support is an error, and is never dropped silently.
"""

import difflib
import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from fastlm.errors import InputError, show
from fastlm.schema import Name, field_name, first_error
from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.foreign_fields import NEUTRAL, refusal

Body = TypeVar("Body", bound="RequestBody")
STRICT = ConfigDict(extra="forbid", strict=True)
# fields that cannot change an answer; the log and a header of the response name them
IGNORED = (
    "best_of", "cache_prompt", "keep_alive", "metadata", "modalities", "prediction",
    "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "request_id",
    "safety_identifier", "service_tier", "user", "verbosity", *NEUTRAL,
)  # fmt: skip
# similarity of the names in a hint, which must not name another field: n_predict, prediction
MIN_SIMILARITY = 0.8
MAX_CONTAINERS = 100_000  # lists and objects of a body
MAX_ERRORS = 1000  # of a body that are examined; pydantic takes microseconds for each


def _integer(value: Any) -> Any:
    """Convert a float such as 3.0 to an integer, as JSON schema allows."""
    return int(value) if type(value) is float and value.is_integer() else value


def _integers(value: Any) -> Any:
    has_float = isinstance(value, list) and float in set(map(type, value))
    return [_integer(item) for item in value] if has_float else value


INTEGER = BeforeValidator(_integer)  # after the bounds in an Annotated[int, ...]
PositiveInt = Annotated[int, Field(ge=1, le=2**31), INTEGER]
EmptyOrText = Annotated[str, Field(max_length=2**26)]
Text = Annotated[EmptyOrText, Field(min_length=1)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    Field(fail_fast=True),
    BeforeValidator(_integers),
]
ModelName = Annotated[Name, Field(max_length=256)]
Label = Annotated[Name, Field(max_length=512)]
# of a response or a conversation. The pattern excludes e-mail addresses: ids are not scrubbed
Identifier = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,128}$")]
JsonSchema = Annotated[dict[str, Any] | bool, WithJsonSchema({"type": ["object", "boolean"]})]


def reject(expected: str) -> Any:
    """Raise the error of a validator: the value is not what it ``expected``."""
    raise PydanticCustomError("expected", "{what}", {"what": expected})


# a Literal without it would accept 1 as True
BOOL = BeforeValidator(lambda value: value if isinstance(value, bool) else reject("true or false"))
AlwaysTrue = Annotated[Literal[True], BOOL]
AlwaysFalse = Annotated[Literal[False], BOOL]


def object_of(pattern: str, value: dict[str, Any], **bounds: int) -> WithJsonSchema:
    """Return the JSON schema of an object whose keys all match ``pattern``."""
    keys = {"propertyNames": {"pattern": pattern}, "additionalProperties": value}
    return WithJsonSchema({"type": "object", **keys, **bounds})


class RequestBody(BaseModel):
    """A JSON object that has known fields only. ``null`` is the same as no field."""

    model_config = STRICT

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = cls.__pydantic_fields__
        for key in body:
            if key in fields:
                continue
            if (message := refusal(key, fields)) is None:
                near = difflib.get_close_matches(key[:80], fields, n=1, cutoff=MIN_SIMILARITY)
                hint = f"; the nearest valid one is {near[0]!r}" if near else ""
                raise ApiError(f"{key:.80}: unknown field{hint}", param=key[:80])
            if body[key] is not None:
                raise ApiError(f"{key}: {message}", param=key)
        return {key: value for key, value in body.items() if value is not None}

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """The fields that are set and have no effect. A field with its default counts as unset."""
        fields, fields_set = type(self).__pydantic_fields__, self.model_fields_set
        return tuple(
            name for name in IGNORED
            if name in fields_set and getattr(self, name) != fields[name].default
        )  # fmt: skip


class EmptyRequest(RequestBody):
    """A request without fields."""


def read_request(data: bytes, model: type[Body]) -> Body:
    """Parse the JSON ``data`` as ``model``. ApiError names the field that is wrong."""
    body = parse_json(data)
    if not isinstance(body, dict):
        raise ApiError(f"body: expected an object, got {show(body):.80}", param="body")
    return validate(body, model)


def validate(body: dict[str, Any], model: type[Body]) -> Body:
    """Convert a JSON object to ``model``. ApiError names the field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        fields = {key: value for key, value in body.items() if value is not None}
        raise _api_error(error, fields) from None


def _api_error(error: ValidationError, body: Any) -> ApiError:
    if (count := error.error_count()) > MAX_ERRORS:
        return ApiError(f"body: expected fields of the right types, got {count} that are not")
    path, message, reason = first_error(error, body)
    if isinstance(reason, ApiError):
        return reason
    name = field_name(path)
    if isinstance(reason, InputError):  # its message begins with the rest of the path
        text = f"{name}{reason}"
        return ApiError(text, param=text.partition(":")[0])
    return ApiError(f"{name}: {message}", param=name)


def count_containers(data: bytes) -> int:
    """Return the number of lists and objects of a JSON text, or a bound of it up to MAX_CONTAINERS.
    A million of them would hold the interpreter for a second; brackets in its strings cost nothing.
    """
    count = data.count(b"[") + data.count(b"{")
    if count > MAX_CONTAINERS:
        text = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
        inside = np.logical_xor.accumulate(text == ord('"'))
        count = int((((text == ord("[")) | (text == ord("{"))) & ~inside).sum())
    return count


def check_json_texts(texts: Iterable[str]) -> None:
    """Refuse JSON texts in a body's strings that have more lists and objects than a body may."""
    if count_containers(",".join(texts).encode()) > MAX_CONTAINERS:
        reject(f"at most {MAX_CONTAINERS:,} lists and objects in all arguments of calls")


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON body. ApiError: not UTF-8, not JSON, a key twice, more than 200
    levels of nesting or MAX_CONTAINERS lists and objects, a number that is not finite, a lone
    surrogate.
    """
    if (count := count_containers(data)) > MAX_CONTAINERS:
        raise ApiError(
            f"body: expected at most {MAX_CONTAINERS:,} lists and objects, got {count:,}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = set[str]()
            key = next(key for key, _ in pairs if key in keys or keys.add(key))
            raise ApiError(f"{key:.80}: expected once, got it twice", param=key[:80])
        return result

    def finite(text: str) -> float:
        if math.isfinite(value := float(text)):
            return value
        raise ApiError(f"body: expected finite numbers, got {text:.80}")

    try:
        from_json(data, allow_inf_nan=False)
        return json.loads(data, object_pairs_hook=unique, parse_float=finite)
    except ApiError:
        raise
    except (ValueError, RecursionError) as error:
        if "recursion" in (reason := str(error)):
            raise ApiError("body: expected at most 200 levels of nesting, got more") from None
        reason = reason.replace("hex escape", "hex escape, as of a lone surrogate,")
        raise ApiError(f"body: expected JSON, got: {reason:.200}") from None
