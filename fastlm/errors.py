"""The one exception for input that cannot be used."""

MOST = 1000  # characters of a message: a value from a file may have any length
HEAD, TAIL = 700, 200


class InputError(ValueError):
    """Bad input, described in one line: the argument, what is wanted and what was passed.

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
