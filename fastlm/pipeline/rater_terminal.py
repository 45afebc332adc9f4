"""Show items to a rater one by one, in a terminal, and read his or her commands.

On a terminal an invalid input prints a line. Otherwise each line of stdin is an input, for scripts.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from fastlm.errors import InputError
from fastlm.pipeline.text import message_text
from fastlm.terminal import console, visible

Item = TypeVar("Item")
Messages = Sequence[Mapping[str, Any]]
WIDTH = 100  # columns at most: longer lines are hard to read
HELP = """\
s         skip this prompt
b         back to the previous prompt
q         quit; what you entered is stored already"""


def check_rater(rater: str) -> None:
    """Check that a rater's name can be printed in one line. InputError: not so."""
    if not rater.strip() or not rater.isprintable():
        raise InputError(f"rater: expected a name, got {rater!r:.60}")


class RaterTerminal(Generic[Item]):
    """The loop over items. A subclass provides the items and stores what the rater enters.

    question: what a terminal asks.
    help: the commands of the subclass, for ``?``; `HELP` follows.
    """

    question = ""
    help = ""

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty()
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # `input` edits lines with it
        self.console = console(highlight=False, soft_wrap=False)
        self.done: list[Any] = []  # keys of the items judged in this session

    def next_item(self) -> Item | None:
        """Return the first item that the rater has not judged, None if there is none."""
        raise NotImplementedError

    def item(self, key: Any) -> Item:
        """Return the item of a key."""
        raise NotImplementedError

    def key(self, item: Item) -> Any:
        raise NotImplementedError

    def title(self) -> str:
        """Return the title of the next item, such as "3 of 20"."""
        raise NotImplementedError

    def messages(self, item: Item) -> tuple[Messages, Sequence[Messages]]:
        """Return the prompt of an item, and its answers."""
        raise NotImplementedError

    def skip(self, item: Item) -> None:
        """Store that the rater skipped the item."""
        raise NotImplementedError

    def enter(self, line: str, item: Item) -> bool:
        """Store an input about the item; return True if the item is judged now. InputError: the
        input has no meaning."""
        raise NotImplementedError

    def run(self) -> None:
        """Ask about items until there is none or the input ends."""
        item, back = self.next_item(), False
        while item is not None:
            self._show(item, "back" if back else self.title())
            action = self._ask(item)
            if action == "quit":
                return
            back = action == "back"
            item = self.item(self.done.pop()) if back else self.next_item()

    def _show(self, item: Item, title: str) -> None:
        prompt, answers = self.messages(item)
        parts: list[RenderableType] = [Rule(title, style="dim")]
        for message in prompt:
            parts += [Text(message["role"], style="bold"), Text(_printable_text(message)), Text()]
        for number, answer in enumerate(answers, 1):
            text = Text("\n".join(_answer_lines(answer)))
            parts.append(Panel(text, title=f"[b]{number}[/b]", title_align="left"))
        self.console.print(Group(*parts), width=min(WIDTH, self.console.width))

    def _ask(self, item: Item) -> str:
        """Read inputs until one ends the work on the item; return "judged", "back" or "quit"."""
        while True:
            line = "q"
            with suppress(EOFError):
                line = input(self.question if self.terminal else "")
            try:
                if action := self._run_command(line.strip(), item):
                    return action
            except InputError as error:
                if not self.terminal:
                    raise
                self.console.print(str(error), markup=False, style="yellow")

    def _run_command(self, line: str, item: Item) -> str | None:
        if not line:
            return None
        if line in ("q", "quit"):
            return "quit"
        if line in ("b", "back"):
            if not self.done:
                raise InputError(
                    "b: expected a prompt before this one, this is the session's first"
                )
            return "back"
        if line in ("?", "h", "help"):
            self.console.print(f"{self.help}\n{HELP}", markup=False)
            return None
        if line in ("s", "skip"):
            self.skip(item)
        elif not self.enter(line, item):
            return None
        self.done.append(self.key(item))
        return "judged"


def _answer_lines(messages: Messages) -> list[str]:
    """Return the texts of an answer's messages, with their roles if one is the user's."""
    if all(message["role"] != "user" for message in messages):
        return [*map(_printable_text, messages)]
    return [f"{message['role']}: {_printable_text(message)}" for message in messages]


def _printable_text(message: Mapping[str, Any]) -> str:
    return visible(message_text(message))
