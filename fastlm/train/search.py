"""Search the passages of a local corpus, ranked by BM25.

Documents are cut at spaces into passages of at most `PASSAGE_CHARACTERS`, about 100 English words
as in DPR (Karpukhin et al. 2020, arXiv:2004.04906). The package bm25s computes the scores
(Lù 2024, arXiv:2407.03618): the sum over the query's words of

    log(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length))

where n of the N passages have the word, and this passage f times among its ``length`` words. This
is the BM25 of Robertson and Zaragoza (2009, "The Probabilistic Relevance Framework") with Lucene's
weight of a word, which is never negative.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlm.data.extract import extract
from fastlm.data.shingles import WITHOUT_SPACES
from fastlm.errors import InputError
from fastlm.sources.source_files import ignore_message, read_source

PASSAGE_CHARACTERS = 600  # three results fit into an observation
K1, B = 1.5, 0.75  # bm25s' defaults, within the ranges that Robertson and Zaragoza recommend
PASSAGE = re.compile(
    rf"\S.{{0,{PASSAGE_CHARACTERS - 1}}}(?!\S)|\S{{{PASSAGE_CHARACTERS}}}", re.DOTALL
)
_SINGLE = "".join(rf"\U{low:08x}-\U{high:08x}" for low, high in WITHOUT_SPACES)
# as `fastlm.data.shingles`: without spaces between words, every character is one
WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")


class Passage(NamedTuple):
    """A part of a document. ``id``: the document's."""

    id: str
    text: str


def check_search_package() -> None:
    """Raise InputError unless bm25s is installed."""
    if find_spec("bm25s") is None:
        raise InputError(
            "environment: expected the package bm25s, which is not installed"
            " (pip install 'fastlm[search]')"
        )


def split_words(text: str) -> list[str]:
    """Return the words of a text, casefolded."""
    return WORD.findall(text.casefold())


def read_passages(
    sources: Sequence[str], *, cache: Path, on_skip: Callable[[str], None] = ignore_message
) -> Iterator[Passage]:
    """Yield the passages of sources (`fastlm.sources.source_files`). Line breaks become spaces."""
    for source in sources:
        for document in read_source(source, cache=cache, on_skip=on_skip):
            for text in PASSAGE.findall(" ".join(extract(document).split())):
                yield Passage(document.id, text)


class SearchIndex:
    """The passages of a corpus, in order. ``identity`` identifies their content. InputError: no
    passage has a word, bm25s is missing.
    """

    def __init__(self, passages: Iterable[Passage]):
        check_search_package()
        import bm25s

        vocabulary: dict[str, int] = {}
        self.passages: list[Passage] = []
        ids: list[list[int]] = []
        digest = sha256()
        for passage in passages:
            if words := split_words(passage.text):
                self.passages.append(passage)
                ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
                digest.update("\0".join((*passage, "")).encode(errors="surrogatepass"))
        if not self.passages:
            raise InputError("search_corpus: expected documents with words, got none")
        self.identity = digest.hexdigest()[:16]
        self._bm25: Any = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
        self._bm25.index((ids, vocabulary), create_empty_token=False, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Return the score of each passage, (passages,) float32. A word that the query repeats
        counts as often. InputError: the query has no word.
        """
        words = split_words(query)
        if not words:
            raise InputError(f"query: expected words, got {query!r:.60}")
        return self._bm25.get_scores(words)

    def search(self, query: str, count: int) -> list[Passage]:
        """Return the ``count`` passages with the highest scores above 0, the best first. Of equal
        scores, the first passage of the corpus comes first. InputError: as `scores`.
        """
        scores = self.scores(query)
        best = np.argsort(-scores, kind="stable")[:count]
        return [self.passages[i] for i in best if scores[i] > 0]
