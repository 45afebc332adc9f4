"""The fields of a JSON request: each is checked, and one that is not known is refused.

A `Field` says what it accepts twice: as a function that checks a value, and as JSON schema for
/openapi.json. A field that the server would have to ignore is an error, never dropped.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastlm.errors import InputError, check_unicode, show, unknown_key

Schema = dict[str, Any]
KINDS = {
    "array": "a list", "integer": "a whole number", "object": "an object", "string": "a text",
}  # fmt: skip
ID = "[A-Za-z0-9_-]{1,128}"
T = TypeVar("T")


class ApiError(InputError):
    """A refused request in OpenAI's terms. ``param``: the field at fault."""

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
        """OpenAI's shape of an error."""
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


@dataclass(frozen=True)
class Field:
    """``read(value, name)`` returns the value as the server uses it, or raises. ``null`` stands for
    ``default``, as if the field were missing.
    """

    read: Callable[[Any, str], Any]
    schema: Schema
    default: Any = None
    required: bool = False


def wrong(name: str, wanted: str, value: Any) -> ApiError:
    return ApiError(f"{name}: wanted {wanted}, got {show(value):.80}", param=name)


def number(low: float, high: float, default: float | None = None, *, above: bool = False) -> Field:
    """A finite number from ``low`` (not itself: ``above``) to ``high``."""
    wanted = f"a number {'above' if above else 'from'} {low:g} to {high:g}"

    def read(value: Any, name: str) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):
            raise wrong(name, wanted, value)
        return float(value)

    edge = "exclusiveMinimum" if above else "minimum"
    return Field(read, {"type": "number", edge: low, "maximum": high}, default)


def whole(low: int, high: int, default: int | None = None) -> Field:
    """A whole number from ``low`` to ``high``; 3.0 is one, as in JSON schema."""

    def read(value: Any, name: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, f"a whole number from {low} to {high}", value)
        return value

    return Field(read, {"type": "integer", "minimum": low, "maximum": high}, default)


def flag(default: bool | None = False) -> Field:
    def read(value: Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise wrong(name, "true or false", value)
        return value

    return Field(read, {"type": "boolean"}, default)


def text(
    most: int, default: str | None = None, *, required: bool = False, empty: bool = False
) -> Field:
    """A text of 1 to ``most`` characters, or of 0 (``empty``)."""
    least = 0 if empty else 1

    def read(value: Any, name: str) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise wrong(name, f"a text of {least} to {most} characters", value)
        check_unicode(value, name)
        return value

    schema = {"type": "string", "minLength": least, "maxLength": most}
    return Field(read, schema, default, required)


def name(most: int, default: str | None = None, *, required: bool = False) -> Field:
    """A text of 1 to ``most`` characters that can be printed in a line."""
    plain = text(most, default, required=required)

    def read(value: Any, where: str) -> str:
        if not plain.read(value, where).isprintable():
            raise wrong(where, "characters that can be printed in a line", value)
        return value

    return Field(read, plain.schema, default, required)


def identifier(default: str | None = None) -> Field:
    """The id of a response or a conversation. Personal data is not scrubbed from ids: an address
    is none.
    """

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(ID, value):
            raise wrong(where, "1 to 128 letters, digits, _ and -", value)
        return value

    return Field(read, {"type": "string", "pattern": f"^{ID}$"}, default)


def choice(*values: Any, default: Any = None) -> Field:
    """One of some values."""
    wanted = " or ".join(json.dumps(value) for value in values)

    def read(value: Any, name: str) -> Any:
        for one in values:
            if value == one and isinstance(value, bool) == isinstance(one, bool):
                return one  # 1 for 1.0
        raise wrong(name, wanted, value)

    return Field(read, {"enum": list(values)}, default)


def list_of(item: Field, low: int, high: int, *, one: bool = False) -> Field:
    """A list of ``low`` to ``high`` items, read as a tuple; ``one``: an item alone is a list."""

    def read(value: Any, name: str) -> tuple[Any, ...]:
        if one and not isinstance(value, list):
            return (item.read(value, name),)
        if not isinstance(value, list) or not low <= len(value) <= high:
            got = f"{len(value)} items" if isinstance(value, list) else value
            raise wrong(name, f"a list of {low} to {high} items", got)
        return tuple(item.read(v, f"{name}[{i}]") for i, v in enumerate(value))

    schema: Schema = {"type": "array", "items": item.schema, "minItems": low, "maxItems": high}
    return Field(read, {"anyOf": [item.schema, schema]} if one else schema, ())


def table(fields: Mapping[str, Field]) -> Field:
    """An object with fields of its own, read as a dict of all of them."""
    return Field(lambda value, name: read_fields(value, fields, name), schema_of(fields))


def read_fields(body: Any, fields: Mapping[str, Field], name: str = "") -> dict[str, Any]:
    """All ``fields`` of an object by name, checked. ApiError: not an object, a field that is
    unknown or missing, a value that the field refuses.
    """
    prefix = f"{name}." if name else ""
    if not isinstance(body, dict):
        raise wrong(name or "body", "an object", body)
    for key in body:
        if key not in fields:
            full = f"{prefix}{key}"[:200]
            raise ApiError(unknown_key(full, key, fields), param=full)
    found = {}
    for key, field in fields.items():
        value = body.get(key)
        if value is None:
            if field.required:
                wanted = _kinds(field.schema)
                raise ApiError(f"{prefix}{key}: wanted {wanted}, got none", param=prefix + key)
            found[key] = field.default
            continue
        try:
            found[key] = field.read(value, prefix + key)
        except InputError as error:  # of a reader that is not ours: it names the place
            if isinstance(error, ApiError):
                raise
            raise ApiError(str(error), param=prefix + key) from None
    return found


def _kinds(schema: Schema) -> str:
    """What a schema accepts, in words."""
    kinds = [KINDS[one["type"]] for one in schema.get("anyOf", [schema])]
    return " or ".join(dict.fromkeys(kinds))


def schema_of(fields: Mapping[str, Field]) -> Schema:
    """JSON schema of an object with these fields."""
    properties = {
        key: field.schema if field.required else {"anyOf": [field.schema, {"type": "null"}]}
        for key, field in fields.items()
    }
    required = [key for key, field in fields.items() if field.required]
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def parse_body(data: bytes) -> Any:
    """The value of a JSON body. ApiError: not UTF-8, not JSON, nested too deep, a key
    twice, a value that `check_values` refuses."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ApiError(f"{key:.80}: wanted once, got it twice", param=key[:80])
            found[key] = value
        return found

    def refuse(name: str) -> Any:
        raise ApiError(f"body: wanted finite numbers, got {name}")

    try:
        value = json.loads(data.decode(), object_pairs_hook=once, parse_constant=refuse)
        for key, item in value.items() if isinstance(value, dict) else ():
            check_values(key, "body")
            check_values(item, key[:80])
        return value
    except ApiError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ApiError(f"body: wanted JSON, got: {reason:.200}") from None


def check_values(value: Any, name: str) -> None:
    """ApiError for what Python's reader of JSON lets pass: a number like 1e999, which it reads as
    infinity, and a lone surrogate in a text or a key, which no response could quote.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            message = f"{name}: wanted valid Unicode, got a lone surrogate"
            raise ApiError(message, param=name) from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ApiError(f"{name}: wanted finite numbers, got one that is too large", param=name)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_values(key, name)
            check_values(item, name)
    elif isinstance(value, list):
        for item in value:
            check_values(item, name)


def checked(read: Callable[[Any], T], body: Any) -> T:
    """``read(body)``, whose every InputError is the client's: an `ApiError`."""
    try:
        return read(body)
    except ApiError:
        raise
    except InputError as error:
        raise ApiError(str(error)) from None
