"""A linear classifier of texts on hashed n-grams: one class and one file format for all scores.

    classifier = TextClassifier.fit(texts, labels, Ngrams(words=2))
    classifier.logits(texts)            # float64, (texts,); positive: rather label 1

A text is cut into words (runs of letters and digits; in scripts without spaces every character).
Its n-grams of words and of characters are hashed into 2**18 buckets. A bucket's feature is the
square root of its count, divided by the norm of them all. The classifier is logistic regression
(scikit-learn, for training only), whose weights are stored as whole multiples of 2**-16. With the
roots rounded to multiples of 2**-8, a logit's sum is exact: it is the same on every machine.

The file is safetensors with JSON in its metadata. It needs no pickle, so a foreign file can do no
harm. No model ships with fastlm.

Rejected: scikit-learn's HashingVectorizer, 0.42 ms a page of 3,400 characters for words and pairs,
2.4 ms for pieces of 3 to 5 characters, where this takes 0.14 and 0.30 ms (Zen 4); fastText, whose
packages have no wheels for all supported versions of Python; signed hashes (Weinberger et al. 2009,
arXiv 0902.2206), which change nothing at 2**18 buckets; 2**13 buckets, which cost a toxicity judge
6 of 500 errors.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval, Len
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.files import make_folder, open_regular, reason, save_atomic
from fastlm.schema import Finite, parse

BITS = 18  # a set of 1,000 texts has 100,000 n-grams; 2**16 buckets lose 1 of 500, 2**20 gain none
SCALE = 6.0  # of features during training: 3 finds 5 of 500 toxic texts less, 12 is no better
WEIGHT_UNIT, ROOT_UNIT = 2.0**-16, 2.0**-8
# A product of a weight and a root has 31 + 14 bits, so that 2**18 of them fit into 63
MAX_WEIGHT, MAX_ROOT = 2**31 - 1, 2**14 - 1
MAX_FILE_BYTES = 1 << 23  # the weights have 1 MiB
MAX_WORD = 64  # characters of a word that have different factors in its hash
METADATA_KEY, FORMAT = "fastlm", "text classifier"
FACTOR = 0x100000001B3  # FNV's prime, for polynomials modulo 2**64
SPREAD = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: neighbours differ in all bits
# Characters of words in ASCII; "*", "@", "$" and "!" replace letters in rude words
ASCII_WORD = "abcdefghijklmnopqrstuvwxyz0123456789'*@$!"
# Punctuation, symbols and spaces beyond ASCII. Ranges instead of Unicode's categories, which differ
# between versions of Python: a model must read the same features everywhere
NOT_WORD = (
    (0x80, 0xA9), (0xAB, 0xB4), (0xB6, 0xB9), (0xBB, 0xBF), (0xD7, 0xD7), (0xF7, 0xF7),
    (0x2000, 0x2BFF), (0x3000, 0x3004), (0x3008, 0x3020), (0x30FB, 0x30FB), (0xD800, 0xF8FF),
    (0xFE10, 0xFE6F), (0xFF00, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65),
    (0xFFF0, 0xFFFF),
)  # fmt: skip
# Scripts without spaces between words: Thai to Tibetan, Myanmar, Khmer, Chinese and Japanese
SINGLE = ((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xA4CF), (0xF900, 0xFAFF))


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of a classifier: of 1 to ``words`` words, and of each of the numbers
    ``characters`` of characters, with one space between words.
    """

    words: Annotated[int, Interval(ge=1, le=5)] = 2
    characters: Annotated[tuple[Annotated[int, Interval(ge=2, le=8)], ...], Len(0, 8)] = ()


class _Metadata(TypedDict):
    """The JSON in the metadata of a file. ``info`` belongs to the kind of model."""

    format: Literal["text classifier"]
    version: Literal[1]
    kind: str
    packages: dict[str, str]
    ngrams: Ngrams
    bias: Finite
    info: dict[str, Any]


@dataclass(frozen=True)
class TextClassifier:
    """A linear classifier of texts.

    Args:
        weights: int32 (2**BITS,), multiples of `WEIGHT_UNIT`.
        bias: added to every logit.
        ngrams: the features.
        packages: versions of the packages that fitted it.
    """

    weights: np.ndarray
    bias: float
    ngrams: Ngrams
    packages: dict[str, str] = field(default_factory=dict)

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[bool], ngrams: Ngrams) -> "TextClassifier":
        """Fit logistic regression to texts. Both labels have the same total weight.

        InputError: only one label, or scikit-learn is not installed.
        """
        return cls.fit_features(feature_matrix(texts, ngrams), np.asarray(labels, bool), ngrams)

    @classmethod
    def fit_features(cls, features: Any, labels: np.ndarray, ngrams: Ngrams) -> "TextClassifier":
        """`fit`, with the `feature_matrix` of the texts."""
        return cls.from_coefficients(*fit_logistic_regression(features, labels), ngrams)

    @classmethod
    def from_coefficients(
        cls, coefficients: np.ndarray, bias: float, ngrams: Ngrams
    ) -> "TextClassifier":
        """Return the classifier with the float64 (2**BITS,) ``coefficients`` of the features of
        `feature_matrix`, as `fit_logistic_regression` returns them.
        """
        weights = np.clip(np.rint(coefficients * (SCALE / WEIGHT_UNIT)), -MAX_WEIGHT, MAX_WEIGHT)
        packages = {name: version(name) for name in ("fastlm", "scikit-learn")}
        return cls(weights.astype(np.int32), bias, ngrams, packages)

    def logits(self, texts: Iterable[str]) -> np.ndarray:
        """Return the logit of each text, float64 (texts,). Any text is accepted; a text without a
        word has the logit ``bias``.
        """
        buckets = (hash_ngrams(text, self.ngrams)[0] for text in texts)
        return np.array([self._logits(b, np.zeros_like(b))[0] for b in buckets], np.float64)

    def piece_logits(self, text: str, words: int) -> np.ndarray:
        """Return the logits of pieces of ``words`` words, float64 (pieces,). An n-gram belongs to
        the piece in which it begins. A text without a word has no piece.
        """
        buckets, positions = hash_ngrams(text, self.ngrams)
        return self._logits(buckets, positions // words) if buckets.size else np.zeros(0)

    def _logits(self, buckets: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """Return the logits of pieces 0, 1, ... of the n-grams in ``buckets``."""
        if not buckets.size:
            return np.array([self.bias])
        keys, counts = _count(pieces << BITS | buckets)
        products = self.weights[keys & (2**BITS - 1)].astype(np.int64) * _roots(counts)
        pieces = keys >> BITS
        starts = np.searchsorted(pieces, np.arange(int(pieces[-1]) + 1))
        total, size = np.add.reduceat(products, starts), np.add.reduceat(counts, starts)
        return self.bias + total * (WEIGHT_UNIT * ROOT_UNIT) / np.sqrt(size)

    def save(self, path: Path, kind: str, info: dict[str, Any]) -> None:
        """Write the classifier and ``info``, values of JSON, to one file. InputError: not
        writable.
        """
        from safetensors.numpy import save_file

        metadata = _Metadata(
            format=FORMAT, version=1, kind=kind, packages=self.packages, ngrams=self.ngrams,
            bias=self.bias, info=info,
        )  # fmt: skip
        text = json.dumps(metadata | {"ngrams": vars(self.ngrams)}, ensure_ascii=False)
        make_folder(path.absolute().parent)
        # one key: safetensors writes several in any order
        save_atomic(
            path, lambda part: save_file({"weights": self.weights}, part, {METADATA_KEY: text})
        )

    @classmethod
    def load(cls, path: str | Path, kind: str) -> tuple["TextClassifier", dict[str, Any]]:
        """Return what `save` wrote, and ``info``. InputError: missing, damaged, of another kind."""
        from safetensors import SafetensorError, safe_open

        expected = f"{path}: expected a {kind} model of fastlm"
        try:
            with open_regular(path) as file:
                size = file.seek(0, 2)
            if size > MAX_FILE_BYTES:
                raise InputError(f"{expected} of at most {MAX_FILE_BYTES:,} bytes, got {size:,}")
            with safe_open(path, framework="numpy") as tensors:
                text = (tensors.metadata() or {}).get(METADATA_KEY)
                names = [*tensors.keys()]
                if text is None or names != ["weights"]:
                    raise InputError(f"{expected}, got another file of safetensors")
                header = tensors.get_slice("weights")
                form = header.get_dtype(), tuple(header.get_shape())
                if form != ("I32", (2**BITS,)):  # numpy has no type for some others
                    raise InputError(f"{path}: weights: expected I32 ({2**BITS},), got {form}")
                weights = tensors.get_tensor("weights")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{expected}, got: {reason(error)}") from None
        metadata = parse(text, _Metadata, str(path))
        if metadata["kind"] != kind:
            raise InputError(f"{expected}, got a model of {metadata['kind']!r:.80}")
        ngrams = Ngrams(metadata["ngrams"].words, tuple(metadata["ngrams"].characters))
        return cls(weights, metadata["bias"], ngrams, metadata["packages"]), metadata["info"]


def feature_matrix(texts: Sequence[str], ngrams: Ngrams) -> Any:
    """Return the features of texts for training, scipy's csr_array (texts, 2**BITS), with rows of
    norm `SCALE`.
    """
    from scipy.sparse import csr_array

    starts, columns, values = [0], [np.zeros(0, np.int32)], [np.zeros(0)]
    for text in texts:
        buckets, _ = hash_ngrams(text, ngrams)
        keys, counts = _count(buckets)
        columns.append(keys.astype(np.int32))
        norm = math.sqrt(max(1, len(buckets)))
        values.append(_roots(counts) * (SCALE * ROOT_UNIT / norm))
        starts.append(starts[-1] + len(keys))
    data = np.concatenate(values), np.concatenate(columns), np.array(starts)
    return csr_array(data, shape=(len(texts), 2**BITS))


def fit_logistic_regression(
    features: Any, labels: np.ndarray, *, intercept: bool = True
) -> tuple[np.ndarray, float]:
    """Fit logistic regression to a csr_array of features (rows, columns) and bool (rows,) labels,
    and return the coefficients, float64 (columns,), and the intercept, 0.0 unless it is fitted.
    Both labels have the same total weight, so that its errors do not depend on their frequencies.

    InputError: scikit-learn is not installed, or only one label.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise InputError(
            "classifier: expected the package scikit-learn, which is not installed (pip install"
            " 'fastlm[data]')"
        ) from None
    if labels.all() or not labels.any():
        raise InputError(f"labels: expected examples with both labels, got {len(labels)} with one")
    # with the default tolerance, 1e-4, counts of right answers change by one
    model = LogisticRegression(
        class_weight="balanced", fit_intercept=intercept, tol=1e-6, max_iter=2000
    )
    columns = np.unique(features.indices)  # others have the coefficient 0, at the cost of the rest
    model.fit(features[:, columns], labels)
    coefficients = np.zeros(features.shape[1])
    coefficients[columns] = model.coef_[0]
    return coefficients, float(np.ravel(model.intercept_)[0])


def hash_ngrams(text: str, ngrams: Ngrams) -> tuple[np.ndarray, np.ndarray]:
    """Return the buckets of all n-grams of ``text``, int64 (n-grams,), and the index of the word in
    which each begins; the last n-gram begins in the last word. Both are empty without a word.
    """
    codes, in_word, begins = _words(text)
    words = np.cumsum(begins) - 1  # of each character
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    hashes, positions = [], []
    if ngrams.characters:
        spaced = in_word.copy()
        spaced[1:] |= in_word[:-1]  # one space after each word
        characters = np.where(in_word, codes, ord(" "))[spaced].astype(np.uint64)
        indices = words[spaced]
        rolling = characters
        for n in range(2, max(ngrams.characters) + 1):
            rolling = rolling[:-1] * np.uint64(FACTOR) + characters[n - 1 :]
            if n in ngrams.characters:
                hashes.append(_spread(rolling, 16 + n))
                positions.append(indices[: len(rolling)])
    indices = words[in_word]
    offsets = np.minimum(np.flatnonzero(in_word) - starts[indices], MAX_WORD - 1)
    terms = (codes[in_word].astype(np.uint64) + np.uint64(1)) * _powers()[offsets]
    word_hashes = np.add.reduceat(terms, np.searchsorted(indices, np.arange(len(starts))))
    rolling = word_hashes
    for n in range(ngrams.words, 0, -1):  # single words last: one begins in the last word
        rolling = word_hashes
        for k in range(1, n):
            rolling = rolling[:-1] * np.uint64(FACTOR) + word_hashes[k:]
        hashes.append(_spread(rolling, n))
        positions.append(np.arange(len(rolling)))
    buckets = (np.concatenate(hashes) >> np.uint64(64 - BITS)).astype(np.int64)
    return buckets, np.concatenate(positions)


def _count(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys in order, and how often each occurs: np.unique at half its cost."""
    if keys.max(initial=0) < 2**31:  # sorts twice as fast
        keys = keys.astype(np.int32)
    keys = np.sort(keys)
    starts = np.flatnonzero(np.concatenate(([True] * (keys.size > 0), keys[1:] != keys[:-1])))
    return keys[starts].astype(np.int64), np.diff(starts, append=keys.size)


def _words(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the code points of ``text`` in lower case, True for those in words, and True for the
    first of each word.
    """
    text = text.lower().replace("\u2019", "'")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _character_kinds()[np.minimum(codes, 0x10000)]
    in_word, single = kinds > 0, kinds == 2
    begins = in_word.copy()
    begins[1:] &= ~in_word[:-1] | single[1:] | single[:-1]
    return codes, in_word, begins


@cache
def _character_kinds() -> np.ndarray:
    """Return 0 (not in a word), 1 (in a word), 2 (a word) for each code point below 0x10000, and
    for all others.
    """
    kinds = np.ones(0x10001, np.uint8)
    kinds[:0x80] = 0
    kinds[[ord(c) for c in ASCII_WORD]] = 1
    for first, last in SINGLE:
        kinds[first : last + 1] = 2
    kinds[0x10000] = 2  # rare Chinese characters, emoji, old scripts
    for first, last in NOT_WORD:
        kinds[first : last + 1] = 0
    return kinds


@cache
def _powers() -> np.ndarray:
    """Return the powers of FACTOR modulo 2**64, uint64 (MAX_WORD,)."""
    return np.array([pow(FACTOR, i, 2**64) for i in range(MAX_WORD)], np.uint64)


@cache
def _root_table() -> np.ndarray:
    counts = np.arange(int((MAX_ROOT * ROOT_UNIT) ** 2) + 1)
    return np.rint(np.sqrt(counts) / ROOT_UNIT).astype(np.int64)


def _roots(counts: np.ndarray) -> np.ndarray:
    """Return the square roots of counts, in multiples of `ROOT_UNIT`."""
    table = _root_table()
    return table[np.minimum(counts, len(table) - 1)]


def _spread(hashes: np.ndarray, kind: int) -> np.ndarray:
    """Return hashes with all bits mixed, so that the highest depend on all; differs by ``kind``."""
    mixed = hashes + np.uint64(kind * SPREAD % 2**64)
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(SPREAD)
    return (mixed ^ mixed >> np.uint64(29)) * np.uint64(SPREAD)
