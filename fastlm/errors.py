"""The one exception that means "what you gave cannot be used"."""


class InputError(ValueError):
    """Bad input, told in one line: the argument, what is wanted and what came.

    The library raises it, the command line prints its text and exits with status 2.
    """
