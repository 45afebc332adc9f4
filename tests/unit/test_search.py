"""Search of a local corpus: words, passages, and BM25 by its formula in float64."""

import json
import math
import random
import sys

import numpy as np
import pytest

from fastlm.errors import InputError
from fastlm.train.search import (
    K1,
    PASSAGE_CHARACTERS,
    B,
    Passage,
    SearchIndex,
    read_passages,
    split_words,
)

TEXTS = (
    "the cat sat on the mat", "the dog chased the cat", "Ein Hund, ein Wort; 7",
    "北京是中国的首都", "the cat sat on the mat", "the end of the story",
)  # fmt: skip


def index_of(texts) -> SearchIndex:
    return SearchIndex(Passage(str(i), text) for i, text in enumerate(texts))


def bm25(texts, query: str) -> np.ndarray:
    documents = [split_words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in split_words(query):
        n = sum(word in document for document in documents)
        weight = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
        for i, document in enumerate(documents):
            f = document.count(word)
            scores[i] += weight * f / (f + K1 * (1 - B + B * len(document) / mean))
    return scores


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("cat", "104"), ("the the cat", "104"), ("HUND?", "2"), ("7", "2"), ("首都", "3"),
        ("dog unknown", "1"), ("unknown", ""), ("story cat", "510"),
    ],
)  # fmt: skip
def test_ranking(query, ids) -> None:
    """Equal scores (0 and 4) keep the order of the corpus; a score of 0 is no result."""
    assert "".join(passage.id for passage in index_of(TEXTS).search(query, 3)) == ids


def test_scores_are_bm25() -> None:
    draw = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(draw.choices(words, range(60), k=draw.randint(1, 90))) for _ in range(200)]
    index = index_of(texts)
    for _ in range(20):
        query = " ".join(draw.choices([*words, "unknown"], k=draw.randint(1, 9)))
        np.testing.assert_allclose(index.scores(query), bm25(texts, query), rtol=1e-5, atol=1e-6)


def test_words() -> None:
    assert split_words("Straße, x2_y! don't") == ["strasse", "x2_y", "don", "t"]
    assert split_words("東京Tower 7") == ["東", "京", "tower", "7"]


def test_passages(tmp_path) -> None:
    text = " ".join(["word"] * 200) + "\n\n" + "x" * 1000 + " end"
    (tmp_path / "a.txt").write_text(text)
    rows = [{"text": "first"}, {"text": " \n"}, {"text": "one\ntwo"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.html").write_text("<html><body><p>" + "a page " * 20 + "</p></body></html>")
    *passages, page = read_passages([str(tmp_path)], cache=tmp_path)
    assert passages[-2:] == [("b.jsonl:1", "first"), ("b.jsonl:3", "one two")]
    assert page == ("c.html", ("a page " * 20).strip())
    texts = [text for id, text in passages[:-2] if id == "a.txt"]
    assert len(texts) == len(passages) - 2 and max(map(len, texts)) <= PASSAGE_CHARACTERS
    assert "".join(texts).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert texts[0] == " ".join(["word"] * 120)  # cut at a space


@pytest.mark.parametrize("texts", [(), ("...", "--")])
def test_a_corpus_without_words(texts) -> None:
    with pytest.raises(InputError, match="search_corpus: expected documents with words, got none"):
        index_of(texts)


@pytest.mark.parametrize("query", ["", " ", "?!"])
def test_a_query_without_words(query) -> None:
    with pytest.raises(InputError, match="query: expected words, got"):
        index_of(TEXTS).search(query, 3)


def test_identity() -> None:
    """It depends on the passages, their documents and their order, not on anything else."""
    identity = index_of(TEXTS).identity
    assert identity == index_of((*TEXTS, "...")).identity
    others = [TEXTS[:-1], TEXTS[::-1], (*TEXTS[:-1], "the end")]
    assert len({identity, *(index_of(texts).identity for texts in others)}) == 4


def test_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"environment: expected the package bm25s, .*\[search\]"):
        index_of(TEXTS)
