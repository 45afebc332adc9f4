"""Features of a prompt as 43 bytes without its text, to see whether prompts change.

Each of `FEATURES` is stored as the number of its bin, so that a window of prompts is a histogram
per feature. `BUCKETS` more bytes say how often words fall into each of as many buckets of a hash,
in 16 steps: many words share a bucket, so that no text can be read back. Whoever has the database
and a guess at a short prompt can see whether the guess fits.
"""

import math
import string
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

import numpy as np

VERSION = 1
MOST_CHARACTERS = 4096  # of a prompt; the rest is not looked at
BUCKETS = 32
STEPS = 15
SHARES = (1e-9, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # the first bin is none at all
FEATURES: dict[str, tuple[float, ...]] = {  # the edges between bins
    "prompt tokens": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "turns": (2, 3, 4, 6, 10, 20),
    "characters": (8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    "lines": (2, 3, 5, 9, 17, 33),
    "word length": (3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 9),
    "question marks": (1, 2, 3),
    "digits": SHARES,
    "capitals": SHARES,
    "punctuation": SHARES,
    "beyond ASCII": SHARES,
}
NAMES = tuple(FEATURES)
BINS = tuple(len(edges) + 1 for edges in FEATURES.values())
SIZE = 1 + len(FEATURES) + BUCKETS
PUNCTUATION = frozenset(string.punctuation)


def features(text: str, tokens: int, turns: int) -> bytes:
    """The features of a prompt: its last ``text``, the ``tokens`` and messages of all of it."""
    text = text[:MOST_CHARACTERS]
    words = text.lower().split()
    size = max(1, len(text))
    values = (
        tokens, turns, len(text), 1 + text.count("\n"),
        sum(map(len, words)) / max(1, len(words)), text.count("?"),
        sum(map(str.isdigit, text)) / size, sum(map(str.isupper, text)) / size,
        sum(c in PUNCTUATION for c in text) / size, sum(c > "\x7f" for c in text) / size,
    )  # fmt: skip
    bins = [bisect_right(edges, value) for edges, value in zip(FEATURES.values(), values)]
    buckets = Counter(zlib.crc32(word.encode(errors="replace")) % BUCKETS for word in words)
    # the root, so that a few words that every text has do not hide the others
    shares = [round(STEPS * math.sqrt(buckets[i] / max(1, len(words)))) for i in range(BUCKETS)]
    return bytes((VERSION, *bins, *shares))


def table(stored: Iterable[bytes | None]) -> np.ndarray:
    """(N, features + buckets) uint8 of what `features` made; others are left out."""
    good = [bytes(row) for row in stored if row is not None and len(row) == SIZE]
    found = np.frombuffer(b"".join(good), np.uint8).reshape(-1, SIZE)
    return found[found[:, 0] == VERSION][:, 1:]


def counts(rows: np.ndarray) -> dict[str, np.ndarray]:
    """How many ``rows`` of `table` are in each bin, by feature."""
    return {
        name: np.bincount(rows[:, i], minlength=bins)
        for i, (name, bins) in enumerate(zip(NAMES, BINS))
    }


def vectors(rows: np.ndarray) -> np.ndarray:
    """``rows`` of `table` as vectors, (N, features + buckets) float64, each column from 0 to 1."""
    most = np.array([*(bins - 1 for bins in BINS), *[STEPS] * BUCKETS])
    return rows / most
