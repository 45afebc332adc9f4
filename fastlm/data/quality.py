"""Score the quality of documents: are they rather like the good texts that the user named?

``fastlm data quality --good SOURCE --other SOURCE -o MODEL`` trains a linear classifier on hashed
words and pairs of words (`fastlm.data.text_classifier`), as DCLM (Li et al. 2024, arXiv 2406.11794)
and Dolma 3 do with fastText. The score of a text is the logit: above 0, it is rather like the good
texts. Scores become `BUCKETS` buckets of equal size on held-out documents of the training mix, and
each bucket has a sampling weight. Rejected: a threshold, which keeps nothing of what it doubts; the
probability as the score, which rounds to 0 and 1 where sources are easy to tell apart.

Such a classifier learns the source wherever that is easier to see than the quality. So the model
records for each source the AUC on its held-out documents, and the AUC of a model that was trained
without the source, on the source's documents. If the second is much lower, the model knows the
source, not the quality. It exists only on a side with several sources.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval, Len
from typing_extensions import TypedDict

from fastlm.data.dedup import content_key
from fastlm.data.language import sample
from fastlm.data.text_classifier import Ngrams, TextClassifier, feature_matrix
from fastlm.data.texts import read_texts
from fastlm.errors import InputError
from fastlm.progress import silent
from fastlm.schema import Count, Finite, validate
from fastlm.sources.source_files import ignore_message, printable

KIND = "quality"
BUCKETS = 20
NGRAMS = Ngrams(words=2)
PIECES, PIECE = 16, 1024  # a longer text is scored by so many pieces of so many characters
DIGITS = 3  # of a score
HELDOUT = 5  # one document of so many is held out
MIN_DOCUMENTS = 50  # of a side: with fewer, 10 held-out documents say nothing
MAX_DOCUMENTS = 10_000  # of a source: 1,000 words each are 100 MB of features
# The best bucket has 39 times the weight of the worst, and the mean is 1
DEFAULT_WEIGHTS = tuple((2 * bucket + 1) / BUCKETS for bucket in range(BUCKETS))

Share = Annotated[float, Interval(ge=0, le=1)]


class SourceAuc(TypedDict):
    """What training says about a source.

    ``auc``: the probability that the model gives a held-out document of the source, and one of the
    other side, the right order. ``left_out_auc``: the same for all documents of the source by a
    model trained without it; None if its side has no other source. ``same_text``: documents that
    were read before, from any source.
    """

    source: str
    good: bool
    documents: Count
    heldout: Count
    same_text: Count
    auc: Share
    left_out_auc: Share | None


class _Info(TypedDict):
    """What a file has besides the classifier."""

    sources: list[SourceAuc]
    borders: Annotated[list[Finite], Len(BUCKETS - 1, BUCKETS - 1)]
    weights: Annotated[list[Annotated[Finite, Interval(ge=0)]], Len(BUCKETS, BUCKETS)]


@dataclass(frozen=True)
class QualityModel:
    """Scores documents and sorts them into buckets.

    Args:
        classifier: label 1 is "good".
        borders: float64 (BUCKETS - 1,), in ascending order: the quantiles of the scores of
            held-out documents.
        weights: the sampling weight of each bucket, the worst first.
        sources: what training said about each source.
    """

    classifier: TextClassifier
    borders: np.ndarray
    weights: tuple[float, ...]
    sources: tuple[SourceAuc, ...]

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """Return the score of each text, float64 (texts,). Any text is accepted."""
        samples = (sample(text, PIECES, PIECE) for text in texts)
        return np.round(self.classifier.logits(samples), DIGITS)

    def bucket(self, scores: np.ndarray) -> np.ndarray:
        """Return the bucket of each score, int64 (texts,): 0, the worst, to BUCKETS - 1."""
        return np.searchsorted(self.borders, np.asarray(scores), side="right")

    def save(self, path: Path) -> None:
        """Write the model to one file. InputError: not writable."""
        info = _Info(
            sources=list(self.sources), borders=self.borders.tolist(), weights=list(self.weights)
        )
        self.classifier.save(path, KIND, dict(info))

    @classmethod
    def load(cls, path: str | Path) -> "QualityModel":
        """Read a file of `save`. InputError: missing, damaged, of another kind."""
        classifier, values = TextClassifier.load(path, KIND)
        info = validate(values, _Info, f"{path}: info.")
        borders = np.array(info["borders"])
        if (np.diff(borders) < 0).any():
            raise InputError(f"{path}: borders: expected them in ascending order, got others")
        weights = check_weights(info["weights"], f"{path}: weights")
        return cls(classifier, borders, weights, tuple(info["sources"]))


def check_weights(weights: Sequence[float], name: str = "weights") -> tuple[float, ...]:
    """Return the sampling weights of buckets. InputError: not `BUCKETS` of them, a negative one, or
    only zeros.
    """
    if len(weights) != BUCKETS:
        raise InputError(f"{name}: expected {BUCKETS} numbers, got {len(weights)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise InputError(f"{name}: expected numbers from 0 on, not all 0; got {list(weights)}")
    return tuple(map(float, weights))


def source_table(sources: Sequence[SourceAuc]) -> Any:
    """Return a rich table of what training said about each source."""
    from rich.table import Table

    table = Table(title="Right order of a document of the source and one of the other side (AUC)")
    table.add_column("source")
    table.add_column("side")
    for heading in ("documents", "held out", "AUC held out", "AUC without the source"):
        table.add_column(heading, justify="right")
    for s in sources:
        left_out = "only source" if s["left_out_auc"] is None else f"{s['left_out_auc']:.3f}"
        heldout_auc = f"{s['auc']:.3f}" if s["heldout"] else "-"
        counts = f"{s['documents']:,}", f"{s['heldout']:,}"
        table.add_row(s["source"], "good" if s["good"] else "other", *counts, heldout_auc, left_out)
    return table


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the area under the ROC curve: the probability that a positive score is higher than a
    negative one; equal scores count half (Mann and Whitney 1947). Scores: float (n,), (m,).
    """
    from scipy.stats import rankdata

    n, m = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True)
class _Source:
    """The documents of a source that are used, in the order of their keys."""

    name: str
    good: bool
    same_text: int
    texts: list[str]
    heldout: np.ndarray  # bool (texts,)


def train_quality(
    good: Sequence[str],
    other: Sequence[str],
    *,
    cache: Path | None = None,
    max_documents: int = MAX_DOCUMENTS,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    track: Callable = silent,
    on_skip: Callable[[str], None] = ignore_message,
) -> QualityModel:
    """Train a quality model.

    Args:
        good, other: sources as `fastlm.data.texts.read_texts` takes them; of a prepared corpus the
            training part is read.
        cache: the folder of downloaded packages.
        max_documents: uses so many documents of a source, chosen by the hash of their text.
        weights: the sampling weights of buckets, the worst first.
        track, on_skip: report progress, and what was skipped.

    One document of five, chosen by the hash of its text, is not trained on. A text that occurs
    again, in any source, counts only once.

    InputError: a bad source, a source on both sides, fewer than MIN_DOCUMENTS documents on a side,
    bad options, scikit-learn is not installed.
    """
    weights = check_weights(weights)
    if max_documents < MIN_DOCUMENTS:
        raise InputError(f"documents: expected {MIN_DOCUMENTS} or more, got {max_documents}")
    for name, side in (("good", good), ("other", other)):
        if not side:
            raise InputError(f"{name}: expected at least one source, got none")
    if repeated := sorted(name for name in {*good, *other} if [*good, *other].count(name) > 1):
        raise InputError(f"good, other: expected each source once, got {repeated[0]!r} again")
    seen: set[bytes] = set()
    sources = [
        _read_source(name, name in good, seen, cache, max_documents, on_skip)
        for name in track([*good, *other], "reading", unit="sources")
    ]
    for name, label in (("good", True), ("other", False)):
        count = sum(len(s.texts) for s in sources if s.good is label)
        held_out = sum(int(s.heldout.sum()) for s in sources if s.good is label)
        if count < MIN_DOCUMENTS or held_out in (0, count):
            raise InputError(
                f"{name}: expected {MIN_DOCUMENTS} documents or more, got {count} different ones"
            )
    texts = [text for s in sources for text in s.texts]
    features = feature_matrix(texts, NGRAMS)
    labels = np.concatenate([np.full(len(s.texts), s.good) for s in sources])
    source = np.concatenate([np.full(len(s.texts), i) for i, s in enumerate(sources)])
    heldout = np.concatenate([s.heldout for s in sources])

    def scores(left_out: int | None) -> tuple[TextClassifier, np.ndarray]:
        rows = ~heldout & (source != left_out) if left_out is not None else ~heldout
        classifier = TextClassifier.fit_features(features[rows], labels[rows], NGRAMS)
        return classifier, np.round(classifier.logits(texts), DIGITS)

    classifier, values = scores(None)
    records = []
    for i, s in track([*enumerate(sources)], "leaving a source out", unit="sources"):
        opposite = heldout & (labels != s.good)
        left_out = None
        if sum(other_source.good is s.good for other_source in sources) > 1:
            left_out_values = scores(i)[1]
            left_out = _ordered_auc(s.good, left_out_values[source == i], left_out_values[opposite])
        rows = heldout & (source == i)
        records.append(
            SourceAuc(
                source=printable(s.name), good=s.good, documents=len(s.texts),
                heldout=int(rows.sum()), same_text=s.same_text,
                auc=_ordered_auc(s.good, values[rows], values[opposite]), left_out_auc=left_out,
            )
        )  # fmt: skip
    borders = np.round(
        np.quantile(values[heldout], [i / BUCKETS for i in range(1, BUCKETS)]), DIGITS
    )
    return QualityModel(classifier, borders, weights, tuple(records))


def _ordered_auc(good: bool, scores: np.ndarray, opposite: np.ndarray) -> float:
    """Return the AUC of a source's scores and those of the opposite side, 0.5 without scores."""
    if not len(scores):
        return 0.5
    return auc(scores, opposite) if good else auc(opposite, scores)


def _read_source(
    name: str, good: bool, seen: set[bytes], cache: Path | None, limit: int,
    on_skip: Callable[[str], None],
) -> _Source:  # fmt: skip
    """Read the ``limit`` documents with the smallest keys, in the memory of as many."""
    heap: list[tuple[int, str]] = []  # (negative key, text): the largest key first
    same_text = 0
    for text in read_texts(name, split="train", cache=cache, on_skip=on_skip):
        key = content_key(text)
        if key in seen:
            same_text += 1
            continue
        seen.add(key)
        item = (-int.from_bytes(key), sample(text, PIECES, PIECE))
        if len(heap) < limit:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    if not heap:
        raise InputError(f"source {printable(name)}: expected text, got none")
    ordered = sorted(heap, reverse=True)
    heldout = np.array([-key % HELDOUT == 0 for key, _ in ordered])
    return _Source(name, good, same_text, [text for _, text in ordered], heldout)
