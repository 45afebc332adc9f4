"""The one exception for input that cannot be used, and what several messages say."""

import difflib
from collections.abc import Iterable

MOST = 1000  # characters of a message: a value from a file may have any length
HEAD, TAIL = 700, 200


class InputError(ValueError):
    """Bad input, described in one line: the argument, what was expected and what was passed.

    The library raises it; the command line prints its text and exits with status 2. A message
    longer than `MOST` is cut in the middle.
    """

    def __init__(self, message: str):
        if len(message) > MOST:
            message = f"{message[:HEAD]} ... {message[-TAIL:]}"
        super().__init__(message)


def show(value: object) -> str:
    """``repr(value)``, or the type's name where Python refuses it (an integer of 5,000 digits)."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to print"


def unknown_key(full: str, key: str, known: Iterable[str]) -> str:
    """Return the message about a ``key`` that is not among the ``known`` ones."""
    near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.0)  # quadratic in its length
    return f"{full}: unknown key; the nearest known one is {near[0]!r}"


def check_unicode(text: str, where: str) -> None:
    """Raise InputError if UTF-8 cannot encode ``text``, which has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: expected valid Unicode, got a lone surrogate at {error.start}"
        ) from None
