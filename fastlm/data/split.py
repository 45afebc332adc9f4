"""Split long documents into parts. Rules that count words, and batches that are shuffled by
document, work better with the chapters of a book than with the whole book.
"""

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from math import ceil
from typing import TypeVar

T = TypeVar("T")
WORD = re.compile(r"\S+")
# What a part may end with, best first
ENDS = (("\n\n",), ("\n",), (". ", "! ", "? "))


def split_text(text: str, max_words: int) -> list[str]:
    """Return [``text``], or parts of about equal length and at most ``max_words`` words each.

    A part ends at a blank line, else at the end of a line, of a sentence or of a word: at the last
    such position in the second half of its share.
    """
    if (
        len(text) < 2 * max_words or len(text.split()) <= max_words
    ):  # a word and its space are 2 characters
        return [text]
    starts = array("q", (word.start() for word in WORD.finditer(text)))
    parts, begin, first = [], 0, 0
    while (remaining := len(starts) - first) > max_words:
        share = ceil(remaining / ceil(remaining / max_words))
        middle, end = starts[first + share // 2], starts[first + share]
        cut = next(
            (position for marks in ENDS if (position := _last_mark_end(text, marks, middle, end))),
            end,
        )
        parts.append(text[begin:cut].strip("\n").rstrip())
        begin, first = cut, bisect_left(starts, cut)
    return [*parts, text[begin:].strip("\n")]


def _last_mark_end(text: str, marks: tuple[str, ...], start: int, end: int) -> int:
    """Return the position after the last of ``marks`` in text[start:end], 0 if there is none."""
    ends = (
        position + len(mark) for mark in marks if (position := text.rfind(mark, start, end)) >= 0
    )
    return max(ends, default=0)


def batches(items: Iterable[T], size_of: Callable[[T], int], size: int) -> Iterator[list[T]]:
    """Yield the items in lists. A list ends with the item that brings its total to ``size``."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size_of(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
