"""Run the loop of ``fastlm rank judge``: print an item, read the rater's ranking, store it.

On a terminal a correction opens $VISUAL or $EDITOR. Otherwise each line of stdin is an input, for
scripts.
"""

import json
import re
import sys
from contextlib import suppress

import click
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.pipeline.text import visible
from fastlm.serve.ranking import RankingItem, RankingStore, check_rater

WIDTH = 100  # columns at most: longer lines are hard to read
HELP = """\
2 1 3     answer 2 is the best, then 1, then 3; the last one may be left out
1=2 3     1 and 2 are equally good, 3 is worse (also 1=23)
s         skip this prompt
c 2       correct answer 2 in your editor; c 2 TEXT replaces it by TEXT
b         back to the previous prompt
q         quit; your rankings are stored already"""


def rank_items(store: RankingStore, rater: str, *, skipped: bool = False) -> None:
    """Ask the rater for a ranking of every item that the rater has not ranked (or with ``skipped``,
    has skipped), until there is none or the input ends.

    On a terminal an invalid input prints a line; otherwise it raises InputError.
    """
    check_rater(rater)
    session = _Session(store, rater, skipped)
    try:
        session.ask_all()
    finally:  # also after Ctrl-C
        counts, total = store.progress(rater)
        remaining = total - counts.ranked - counts.skipped
        skips = f", {counts.skipped:,} skipped" if counts.skipped else ""
        line = f"{rater}: {counts.ranked:,} of {total:,} ranked{skips}, {remaining:,} to do"
        session.console.print(line, markup=False)


def parse_ranking(text: str, count: int) -> list[int]:
    """Return the ranks of ``count`` answers, in their order, from an input such as "2 1=3"."""
    expected = f"expected {' '.join(map(str, range(1, count + 1)))} in your order, the best first"
    text = " ".join(text.split())
    spaced = re.sub(" ?= ?", "=", text)
    if count < 10:  # 21=3
        spaced = re.sub(r"(\d)(?=\d)", r"\1 ", spaced)
    ranks: dict[int, int] = {}
    rank = 0
    for rank, tied in enumerate(re.split("[ ,>]+", spaced)):
        for number in tied.split("="):
            if not re.fullmatch("[0-9]{1,9}", number):
                raise InputError(f"{expected} (? shows the commands), got {text!r:.60}")
            answer = int(number)
            if not 1 <= answer <= count or answer in ranks:
                raise InputError(f"{expected}, each once; got {text!r:.60}")
            ranks[answer] = rank
    missing = [answer for answer in range(1, count + 1) if answer not in ranks]
    if len(missing) > 1:
        raise InputError(f"{expected}; {', '.join(map(str, missing))} are missing")
    return [ranks.get(answer, rank + 1) for answer in range(1, count + 1)]


class _Session:
    def __init__(self, store: RankingStore, rater: str, skipped: bool):
        self.store, self.rater, self.skipped = store, rater, skipped
        self.terminal = sys.stdin.isatty()
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # `input` edits lines with it
        self.console = Console(highlight=False, soft_wrap=False)
        self.done: list[int] = []  # items ranked in this session

    def ask_all(self) -> None:
        item, back = self.next(), False
        while item is not None:
            self.show(item, back)
            action = self.ask(item)
            if action == "quit":
                return
            back = action == "back"
            item = self.store.item(self.done.pop(), self.rater) if back else self.next()

    def next(self) -> RankingItem | None:
        after = max(self.done, default=0) if self.skipped else 0
        return self.store.next_item(self.rater, after=after, skipped=self.skipped)

    def show(self, item: RankingItem, back: bool) -> None:
        counts, total = self.store.progress(self.rater)
        number = counts.ranked + counts.skipped + 1
        title = "back" if back else "skipped before" if self.skipped else f"{number:,} of {total:,}"
        parts: list[RenderableType] = [Rule(title, style="dim")]
        for message in item.prompt:
            parts += [Text(message["role"], style="bold"), Text(_printable_text(message)), Text()]
        for number, answer in enumerate(item.answers, 1):
            text = Text("\n".join(map(_printable_text, answer)))
            parts.append(Panel(text, title=f"[b]{number}[/b]", title_align="left"))
        self.console.print(Group(*parts), width=min(WIDTH, self.console.width))

    def ask(self, item: RankingItem) -> str:
        """Read inputs until one ends the work on the item; return "ranked", "back" or "quit"."""
        while True:
            line = "q"
            with suppress(EOFError):
                line = input("best first, ? for help: " if self.terminal else "")
            try:
                if action := self.run_command(line.strip(), item):
                    return action
            except InputError as error:
                if not self.terminal:
                    raise
                self.console.print(str(error), markup=False, style="yellow")

    def run_command(self, line: str, item: RankingItem) -> str | None:
        word, _, rest = line.partition(" ")
        if not line:
            return None
        if word in ("q", "quit"):
            return "quit"
        if word in ("b", "back"):
            if not self.done:
                raise InputError(
                    "b: expected a prompt before this one, this is the session's first"
                )
            return "back"
        if word in ("?", "h", "help"):
            self.console.print(HELP, markup=False)
            return None
        if word in ("c", "correct"):
            self.correct(item, rest)
            return None
        if word in ("s", "skip"):
            self.store.skip(self.rater, item)
        else:
            ranks = parse_ranking(line, len(item.answers))
            self.store.rank(self.rater, item, ranks)
            self.console.print(f"stored: {_order(ranks)}", style="dim")
        self.done.append(item.id)
        return "ranked"

    def correct(self, item: RankingItem, rest: str) -> None:
        number, _, text = rest.strip().partition(" ")
        if not number.isdecimal() or not 1 <= int(number) <= len(item.answers):
            raise InputError(f"c: expected an answer from 1 to {len(item.answers)}, got {number!r}")
        answer = int(number) - 1
        if not text.strip():
            if not self.terminal:
                raise InputError(f"c {number}: expected the corrected text after it, got none")
            text = edit_text(item.answers[answer][-1]["content"])
        if text is not None:
            self.store.correct(self.rater, item, answer, text)
            self.console.print(f"stored: a correction of {number}", style="dim")


def edit_text(text: str, editor: str | None = None) -> str | None:
    """Edit a text in an editor, by default $VISUAL or $EDITOR. Return None if it was not saved."""
    try:
        saved = click.edit(text, editor)
    except (click.ClickException, ValueError) as error:
        raise InputError(f"EDITOR: expected a program that edits a text, got: {error}") from None
    return None if saved is None else saved.removesuffix("\n")


def _order(ranks: list[int]) -> str:
    groups = [
        " = ".join(str(i) for i, r in enumerate(ranks, 1) if r == rank)
        for rank in sorted(set(ranks))
    ]
    return " > ".join(groups)


def _printable_text(message: Message) -> str:
    """Return the text of a message and its tool calls, without control characters."""
    calls = message.get("tool_calls")
    text = message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")
    return visible(text)
