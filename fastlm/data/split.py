"""Split long documents into parts. A book is no worse than its chapters, but rules that count words
and batches shuffled by document work better with chapters.
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


def split_text(text: str, most: int) -> list[str]:
    """Return [``text``], or parts of at most ``most`` words each, about equally long: no stub at
    the end.

    A part ends at a blank line, else at the end of a line, else of a sentence, else of a word: at
    the last such place in the second half of its share.
    """
    if len(text) < 2 * most or len(text.split()) <= most:  # a word and its space are 2 characters
        return [text]
    starts = array("q", (word.start() for word in WORD.finditer(text)))
    parts, begin, first = [], 0, 0
    while (left := len(starts) - first) > most:
        share = ceil(left / ceil(left / most))
        middle, end = starts[first + share // 2], starts[first + share]
        cut = next((at for marks in ENDS if (at := _last(text, marks, middle, end))), end)
        parts.append(text[begin:cut].strip("\n").rstrip())
        begin, first = cut, bisect_left(starts, cut)
    return [*parts, text[begin:].strip("\n")]


def _last(text: str, marks: tuple[str, ...], start: int, end: int) -> int:
    """Return where the last of ``marks`` within text[start:end] ends, 0 if there is none."""
    ends = (at + len(mark) for mark in marks if (at := text.rfind(mark, start, end)) >= 0)
    return max(ends, default=0)


def batches(items: Iterable[T], size_of: Callable[[T], int], size: int) -> Iterator[list[T]]:
    """Yield the items in lists, each of which ends with the item that brings it to ``size``."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size_of(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
