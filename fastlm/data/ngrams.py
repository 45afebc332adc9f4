"""An index of the n-grams of evaluation questions, for three searches:

    which questions are in the data?            `fastlm.evals.contamination`: 40 letters in a row
    which question does a document contain?     `fastlm.data.contamination`: the same
    which question does a short row contain?    `fastlm.feedback.overlap`: 8 words in a row

The searches have different rules because they decide different things. The first two describe a
score, and remove what would make it worthless, by published rules. The third drops a row, also for
a reworded question. Letters and words are represented by integers.

N-grams are compared by 64-bit hashes, computed for a block at once. A bit table passes only
candidates to the exact search. The probability that a billion tokens contain one of a million
n-grams by hash collision is at most 5e-5.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

_BITS = 22  # of the smallest table: 0.5 MB; 70,000 n-grams fill 1 in 60 entries
_FILLED = 64  # at most one entry of so many is filled
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_NONE = np.empty(0, np.uint64)


def hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of each n-gram: (length,) integers -> (length - n + 1,) uint64."""
    if len(ids) < n:
        return _NONE
    size = 1 << len(ids).bit_length()
    # sum of ids[i + k] * BASE^(n - 1 - k), from sums over all ids before i + n and before i
    sums = np.zeros(len(ids) + 1, np.uint64)
    np.cumsum(ids.astype(np.uint64) * _powers(_INVERSE, size)[: len(ids)], out=sums[1:])
    mixed = (sums[n:] - sums[:-n]) * _powers(_BASE, size)[n - 1 : len(ids)]
    mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX
    return mixed ^ (mixed >> np.uint64(29))


@cache
def _powers(base: int, count: int) -> np.ndarray:
    """Return ``base`` to the powers 1 to ``count``, modulo 2^64."""
    return np.cumprod(np.full(count, base, np.uint64))


class NgramIndex:
    """The n-grams of questions.

    Args:
        questions: (length,) integers each; those shorter than ``n`` have no n-gram.
        steps: for each question, only every so many-th n-gram is stored, and the last one. Default:
            all.

    ``distinct``: the number of different n-grams of each question, (questions,).
    """

    def __init__(
        self, questions: Sequence[np.ndarray], n: int, *, steps: Sequence[int] = ()
    ) -> None:
        self.n = n
        question_ngrams = [
            _distinct(hashes(ids, n), step)
            for ids, step in zip(questions, steps or [1] * len(questions), strict=True)
        ]
        self.distinct = np.array([len(grams) for grams in question_ngrams], np.int64)
        self.ngrams, index = np.unique(
            np.concatenate([*question_ngrams, _NONE]), return_inverse=True
        )
        order = np.argsort(index, kind="stable")
        # the questions that have known[i]: owners[begins[i] : begins[i + 1]]
        numbers = np.arange(len(question_ngrams), dtype=np.int32)
        self.owners = np.repeat(numbers, self.distinct)[order]
        self.begins = np.searchsorted(index[order], np.arange(len(self.ngrams) + 1))
        self.in_data = np.zeros(len(self.ngrams), bool)
        bits = max(_BITS, (_FILLED * len(self.ngrams)).bit_length())
        self.shift = np.uint64(64 - bits)
        table = np.zeros(2**bits, bool)
        table[self._slots(self.ngrams)] = True
        # 8 entries a byte: a random read of a larger table takes as long as all else
        self.table = np.packbits(table, bitorder="little")

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Return the indices in ``ngrams`` of the n-grams of ``ids`` that are there, in order."""
        return self.lookup(hashes(ids, self.n))

    def lookup(self, values: np.ndarray) -> np.ndarray:
        """Return the indices in ``ngrams`` of those hashes that are there, in order."""
        slots = self._slots(values)
        entries = self.table[slots >> 3] >> (slots & 7).astype(np.uint8)
        candidates = values[(entries & 1).view(bool)]
        indices = np.searchsorted(self.ngrams[:-1], candidates)
        return indices[self.ngrams[indices] == candidates] if len(candidates) else indices

    def mark(self, ids: np.ndarray) -> None:
        """Mark the n-grams of a piece of the data."""
        self.in_data[self.positions(ids)] = True

    def covered_mask(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids of a question are in an n-gram of the data: (length,) bool."""
        return covered_mask(self.in_data[np.searchsorted(self.ngrams, hashes(ids, self.n))], self.n)

    def shared_counts(self, ids: np.ndarray) -> np.ndarray:
        """Return how many different n-grams each question shares with ``ids``: (questions,)."""
        return np.bincount(self.owners_of(self.positions(ids)), minlength=len(self.distinct))

    def owners_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the questions of n-grams, each n-gram counted once: positions -> (owners,)."""
        owners = [self.owners[self.begins[i] : self.begins[i + 1]] for i in {*positions.tolist()}]
        return np.concatenate(owners) if owners else np.empty(0, np.int32)

    def _slots(self, values: np.ndarray) -> np.ndarray:
        return (values >> self.shift).astype(np.intp)


def covered_mask(hit: np.ndarray, n: int) -> np.ndarray:
    """Return which ids are in one of the n-grams that ``hit`` marks: (length - n + 1,) bool ->
    (length,) bool.
    """
    begins = np.flatnonzero(hit)
    steps = np.zeros(len(hit) + n, np.int64)
    np.add.at(steps, begins, 1)
    np.add.at(steps, begins + n, -1)
    return np.cumsum(steps[:-1]) > 0


def build_indexes(
    questions: Sequence[np.ndarray], sizes: Sequence[int], *, steps: Sequence[int] = ()
) -> dict[int, NgramIndex]:
    """Return n -> the index of the questions of size n (0: of none). Question i has the same
    number in every index. ``steps``: as for `NgramIndex`."""
    none = np.empty(0, np.int64)
    return {
        n: NgramIndex(
            [ids if size == n else none for ids, size in zip(questions, sizes)], n, steps=steps
        )
        for n in sorted({*sizes} - {0})
    }


def _distinct(values: np.ndarray, step: int) -> np.ndarray:
    if step > 1 and len(values):
        values = np.append(values[::step], values[-1])
    return np.unique(values)
