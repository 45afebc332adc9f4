"""The exception for unusable input, and the text of common messages."""

import difflib
from collections.abc import Iterable

MAX_LENGTH = 1000  # characters of a message: a value from a file may have any length
HEAD, TAIL = 700, 200


class InputError(ValueError):
    """Bad input, described in one line: the argument, what was expected and what was passed.

    The library raises it; the command line prints its text and exits with status 2. A message
    longer than `MOST` is cut in the middle.
    """

    def __init__(self, message: str):
        if len(message) > MAX_LENGTH:
            message = f"{message[:HEAD]} ... {message[-TAIL:]}"
        super().__init__(message)


class StorageError(InputError):
    """A file or a database that the system refuses: no fault of the input."""


def show(value: object) -> str:
    """Return ``repr(value)``, or the type's name if that fails (an integer of 5,000 digits)."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to print"


def check_type(value: object, name: str, expected: type | tuple[type, ...], words: str) -> None:
    """Raise InputError, with ``words`` for the expected types, if a value has another type."""
    if not isinstance(value, expected):
        raise InputError(f"{name}: expected {words}, got {type(value).__name__}")


def unknown_key(full: str, key: str, valid: Iterable[str]) -> str:
    """Return the message about a ``key`` that is not among the ``known`` ones."""
    near = difflib.get_close_matches(key[:80], valid, n=1, cutoff=0.0)  # quadratic in its length
    return f"{full}: unknown key; the nearest valid one is {near[0]!r}"


def check_unicode(text: str, name: str) -> None:
    """Raise InputError if UTF-8 cannot encode ``text``, which has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: expected valid Unicode, got a lone surrogate at {error.start}"
        ) from None
