"""Find questions of an evaluation in texts, by n-grams of words (`fastlm.data.ngrams`).

A text contains a question if it has at least `MIN_SHARE` of its distinct n-grams. A question of
fewer words than ``n``, but at least `MIN_WORDS`, has to be in the text in full. Case and
punctuation do not count.
"""

import re
from collections.abc import Iterable

import numpy as np

from fastlm.data.ngrams import build_indexes

WORD = re.compile(r"\w+")
MIN_SHARE = 0.5  # a question that was reworded in one place keeps about that much
MIN_WORDS = 5  # shorter questions ("Who are you?") are too common


class Overlap:
    """An index of questions: (name of the set, text). ``n``: words of an n-gram."""

    def __init__(self, questions: Iterable[tuple[str, str]], n: int = 8) -> None:
        self.ids: dict[str, int] = {}  # word -> id; 0 is for words that no question has
        self.names: list[str] = []
        question_ids, sizes = [], []
        for name, text in questions:
            words = _words(text)
            if len(words) >= MIN_WORDS:
                self.names.append(name)
                question_ids.append(
                    [self.ids.setdefault(word, len(self.ids) + 1) for word in words]
                )
                sizes.append(min(n, len(words)))
        self.indexes = build_indexes([np.array(ids) for ids in question_ids], sizes)

    def find(self, texts: Iterable[str]) -> str | None:
        """Return the set of a question that one of the texts contains, or None."""
        for text in texts:
            ids = np.array([self.ids.get(word, 0) for word in _words(text)], np.int64)
            for index in self.indexes.values():
                shared = index.shared_counts(ids)
                matches = np.flatnonzero((shared > 0) & (shared >= MIN_SHARE * index.distinct))
                if len(matches):
                    return self.names[matches[shared[matches].argmax()]]
        return None


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
