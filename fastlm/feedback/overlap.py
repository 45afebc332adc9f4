"""Which texts hold questions of an evaluation, by the runs of words that they share
(`fastlm.evals.ngrams`).

A question is found in a text that has at least `SHARE` of its different runs of ``n`` words; a
question of fewer words, but at least `LEAST`, as a whole. Case and punctuation do not count.
"""

import re
from collections.abc import Iterable

import numpy as np

from fastlm.evals.ngrams import indexes

WORD = re.compile(r"\w+")
SHARE = 0.5  # a question that was reworded in one place keeps about that much
LEAST = 5  # words; shorter questions ("Who are you?") are everybody's


class Overlap:
    """An index of questions: (name of the set, text). ``n``: words of a run."""

    def __init__(self, questions: Iterable[tuple[str, str]], n: int = 8) -> None:
        self.ids: dict[str, int] = {}  # of words; 0 is a word that no question has
        self.names: list[str] = []
        asked, sizes = [], []
        for name, text in questions:
            words = _words(text)
            if len(words) >= LEAST:
                self.names.append(name)
                asked.append([self.ids.setdefault(word, len(self.ids) + 1) for word in words])
                sizes.append(min(n, len(words)))
        self.indexes = indexes([np.array(ids) for ids in asked], sizes)

    def find(self, texts: Iterable[str]) -> str | None:
        """Return the set of a question that one of the texts holds, None if there is none."""
        for text in texts:
            ids = np.array([self.ids.get(word, 0) for word in _words(text)], np.int64)
            for index in self.indexes.values():
                shared = index.shared(ids)
                found = np.flatnonzero((shared > 0) & (shared >= SHARE * index.distinct))
                if len(found):
                    return self.names[found[shared[found].argmax()]]
        return None


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
