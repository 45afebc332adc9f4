"""The articles of ``article-extraction``, whose text people marked, and their metric.

The pages are not part of the project. They are read from ``$FASTLM_DATA`` or ``../shared/data``
beside the checkout; in both, the folder is ``article-extraction``.
"""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

NAME = "article-extraction"
WORD = re.compile(r"\w+")


def folder() -> Path | None:
    """Return the folder of the articles, or None if this machine has none."""
    root = Path(__file__).resolve().parents[2]
    for data in (os.environ.get("FASTLM_DATA"), root.parent / "shared" / "data"):
        if data and (Path(data) / NAME / "ground-truth.json").is_file():
            return Path(data) / NAME
    return None


def articles(path: Path) -> dict[str, tuple[bytes, str]]:
    """Return {id: (page, its text)}."""
    truth = json.loads((path / "ground-truth.json").read_text())
    return {
        name: (gzip.decompress((path / "html" / f"{name}.html.gz").read_bytes()), t["articleBody"])
        for name, t in sorted(truth.items())
    }


def shingles(text: str) -> Counter[tuple[str, ...]]:
    """Return the multiset of 4-grams of words; a shorter text is one."""
    words = WORD.findall(text)
    if len(words) < 4:
        return Counter([tuple(words)] if words else [])
    return Counter(zip(words, words[1:], words[2:], words[3:]))


def score(pairs: Iterable[tuple[str, str]]) -> tuple[float, float, float]:
    """Return (precision, recall, F1) of pairs (prediction, truth): means over pages, and F1 of the
    means.
    """
    precision, recall, count = 0.0, 0.0, 0
    for prediction, truth in pairs:
        predicted, expected = shingles(prediction), shingles(truth)
        common = (predicted & expected).total()
        precision += common / predicted.total() if predicted else not expected
        recall += common / expected.total() if expected else 1
        count += 1
    precision, recall = precision / count, recall / count
    return precision, recall, 2 * precision * recall / (precision + recall)
