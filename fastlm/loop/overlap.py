"""Which texts hold questions of an evaluation, by the runs of words that they share.

A question is found in a text that has at least `SHARE` of its runs of ``n`` words; a question of
fewer words, but at least `LEAST`, as a whole. Case and punctuation do not count.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

WORD = re.compile(r"\w+")
SHARE = 0.5  # a question that was reworded in one place keeps about that much
LEAST = 5  # words; shorter questions ("Who are you?") are everybody's


class Overlap:
    """An index of questions. ``n``: words of a run."""

    def __init__(self, n: int = 8) -> None:
        self.n = n
        self.runs: dict[tuple[str, ...], set[int]] = defaultdict(set)
        self.sizes: list[int] = []  # of each question, in different runs
        self.names: list[str] = []
        self.lengths: set[int] = set()  # of runs

    def add(self, name: str, question: str) -> None:
        """Add a question of the set ``name``."""
        words = _words(question)
        if len(words) < LEAST:
            return
        length = min(self.n, len(words))
        runs = {*_runs(words, length)}
        for run in runs:
            self.runs[run].add(len(self.sizes))
        self.sizes.append(len(runs))
        self.names.append(name)
        self.lengths.add(length)

    def find(self, texts: Iterable[str]) -> str | None:
        """Return the set of a question that one of the texts holds, None if there is none."""
        for text in texts:
            words = _words(text)
            hits: Counter[int] = Counter()
            for length in sorted(self.lengths):
                for run in {*_runs(words, length)}:
                    hits.update(self.runs.get(run, ()))
            for question, count in hits.most_common():
                if count >= SHARE * self.sizes[question]:
                    return self.names[question]
        return None


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)))
