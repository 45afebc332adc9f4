"""Run the loop of ``fastlm rank judge``: print an item, read the rater's ranking, store it.

On a terminal a correction opens $VISUAL or $EDITOR.
"""

import re

import click

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.pipeline.rater_terminal import RaterTerminal
from fastlm.serve.ranking import RankingItem, RankingStore, check_rater

HELP = """\
2 1 3     answer 2 is the best, then 1, then 3; the last one may be left out
1=2 3     1 and 2 are equally good, 3 is worse (also 1=23)
c 2       correct answer 2 in your editor; c 2 TEXT replaces it by TEXT"""


def rank_items(store: RankingStore, rater: str, *, skipped: bool = False) -> None:
    """Ask the rater for a ranking of every item that the rater has not ranked (or with ``skipped``,
    has skipped), until there is none or the input ends.

    On a terminal an invalid input prints a line; otherwise it raises InputError.
    """
    check_rater(rater)
    session = _RankTerminal(store, rater, skipped)
    try:
        session.run()
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


class _RankTerminal(RaterTerminal[RankingItem]):
    question = "best first, ? for help: "
    help = HELP

    def __init__(self, store: RankingStore, rater: str, skipped: bool):
        super().__init__()
        self.store, self.rater, self.skipped = store, rater, skipped

    def next_item(self) -> RankingItem | None:
        after = max(self.done, default=0) if self.skipped else 0
        return self.store.next_item(self.rater, after=after, skipped=self.skipped)

    def item(self, key: int) -> RankingItem:
        return self.store.item(key, self.rater)

    def key(self, item: RankingItem) -> int:
        return item.id

    def title(self) -> str:
        counts, total = self.store.progress(self.rater)
        number = counts.ranked + counts.skipped + 1
        return "skipped before" if self.skipped else f"{number:,} of {total:,}"

    def messages(self, item: RankingItem) -> tuple[list[Message], tuple[list[Message], ...]]:
        return item.prompt, item.answers

    def skip(self, item: RankingItem) -> None:
        self.store.skip(self.rater, item)

    def enter(self, line: str, item: RankingItem) -> bool:
        word, _, rest = line.partition(" ")
        if word in ("c", "correct"):
            self.correct(item, rest)
            return False
        ranks = parse_ranking(line, len(item.answers))
        self.store.rank(self.rater, item, ranks)
        self.console.print(f"stored: {_order(ranks)}", style="dim")
        return True

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
