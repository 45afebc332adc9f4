"""The one exception that means "what you gave cannot be used"."""

MOST = 1000  # characters of a message: a value from a file may be of any length
HEAD, TAIL = 700, 200


class InputError(ValueError):
    """Bad input, told in one line: the argument, what is wanted and what came.

    The library raises it, the command line prints its text and exits with status 2. A message is
    cut in its middle where it is longer than `MOST`.
    """

    def __init__(self, message: str):
        if len(message) > MOST:
            message = f"{message[:HEAD]} ... {message[-TAIL:]}"
        super().__init__(message)


def show(value: object) -> str:
    """``repr(value)``, also where Python refuses to print (a whole number of 5,000 digits)."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to print"
