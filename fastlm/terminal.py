"""Write to a terminal. All that a command prints goes through this module, because a file name, a
stranger's counts or a model's answer may have characters that control a terminal.
"""

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# control characters that move the cursor or change a terminal, and marks of writing direction
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return a text without characters that control a terminal: each becomes U+FFFD."""
    return UNSAFE.sub("\ufffd", text)


def echo(text: Any = "", *, end: str = "\n", err: bool = False) -> None:
    """Write ``text``, `visible`, to stdout or stderr."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{visible(str(text))}{end}")
    stream.flush()


def write_answer(text: str) -> None:
    """Write a piece of a model's answer to stdout: `visible` on a terminal, exact elsewhere."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def console(**options: Any) -> "Console":
    """Return a console of rich that writes `visible` text. ``options``: its own."""
    from rich.console import Console

    class VisibleConsole(Console):
        def render_str(self, text: str, **values: Any) -> Any:
            return super().render_str(visible(text), **values)

        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):  # also those of `Text`
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return VisibleConsole(**options)
