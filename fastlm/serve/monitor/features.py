"""Compute the features of a prompt as 43 bytes without its text, to detect changes of prompts.

Each of `FEATURES` is stored as the number of its bin, so that a window of prompts is a histogram
per feature. `BUCKETS` more bytes say in 16 steps how many words fall into each bucket of a hash.
Many words share a bucket, so that no text can be read back. Somebody who has the database and a
guess at a short prompt can check the guess.
"""

import math
import string
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

import numpy as np

VERSION = 1
MAX_CHARACTERS = 4096  # of a prompt; the rest is ignored
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
    """Return the features of a prompt: of its last ``text``, and the number of ``tokens`` and of
    messages (``turns``) of the whole prompt."""
    text = text[:MAX_CHARACTERS]
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
    # the square root, so that a few very common words do not hide the others
    shares = [round(STEPS * math.sqrt(buckets[i] / max(1, len(words)))) for i in range(BUCKETS)]
    return bytes((VERSION, *bins, *shares))


def decode_features(rows: Iterable[bytes | None]) -> np.ndarray:
    """Return (N, features + buckets) uint8 of the results of `features`; others are skipped."""
    valid = [bytes(row) for row in rows if row is not None and len(row) == SIZE]
    table = np.frombuffer(b"".join(valid), np.uint8).reshape(-1, SIZE)
    return table[table[:, 0] == VERSION][:, 1:]


def bin_counts(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the number of ``rows`` of `decode_features` in each bin, by feature."""
    return {
        name: np.bincount(rows[:, i], minlength=bins)
        for i, (name, bins) in enumerate(zip(NAMES, BINS))
    }


def feature_vectors(rows: np.ndarray) -> np.ndarray:
    """Return ``rows`` of `decode_features` as (N, features + buckets) float64, each column from 0
    to 1."""
    max_values = np.array([*(bins - 1 for bins in BINS), *[STEPS] * BUCKETS])
    return rows / max_values
