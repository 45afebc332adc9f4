"""JSON that is read back, which somebody may have edited or cut: each kind of file has one schema,
a dataclass or a type, and pydantic checks it where it is read. Nothing is coerced.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from fastlm.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
MAX_SHOWN = 200  # characters of a message, whatever the file holds


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # late: no verb's --help waits for it

    return TypeAdapter(kind)


def from_json(data: str | bytes, kind: type[T], what: str) -> T:
    """``data`` as ``kind``. InputError "WHAT: field: reason": no JSON, or of another kind."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(data, strict=True)
    except ValidationError as e:
        raise InputError(f"{what}: {_reason(e)}") from None


def checked(value: Any, kind: type[T], what: str) -> T:
    """A parsed ``value`` as ``kind``; InputError as `from_json`."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as e:
        raise InputError(f"{what}: {_reason(e)}") from None


def _reason(error: Any) -> str:
    """The first fault in one line: where it is and what was wanted, without the value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    return (f"{where}: {message}" if where else message)[:MAX_SHOWN]
