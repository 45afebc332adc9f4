"""Find near duplicates: locality-sensitive hashing proposes pairs, exact comparison decides.

    >>> find([page, page_with_one_edit, other_page])
    [Duplicate(removed=1, kept=0, similarity=0.97)]

1. `band_keys`: a document's MinHash signature (Broder 1997) of its word 5-grams, in bands.
2. `candidate_groups`: the documents that share a key. Each hash partition of the records can be
   grouped alone.
3. `components`: the connected components of all groups. They are independent of each other.
4. `resolve`: inside a component, documents are taken in order: those of earlier builds first, then
   the longest, then the smallest number. A document is removed if its exact Jaccard similarity to
   one that remains reaches the threshold, otherwise it remains. The result depends on the set of
   documents, and not on the order in which they or the groups come.

Rejected, on 7,842 pages of documentation: to remove all but one of each component without a
comparison, with FineWeb's 14 x 8 bands, which removes 304 documents, of which 283 are less than 0.8
like the one that remains. Rejected for `resolve`: to compare only documents that share a band. That
is quadratic for a site whose template is most of every page; the prefix filter needs no groups, and
finds pairs of a component that share no band.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, log, log1p
from typing import NamedTuple

import numpy as np

from fastlm.data.dedup import THRESHOLD
from fastlm.data.shingles import jaccard, shingles
from fastlm.errors import InputError, check_type

SEED = 1
MAX_HASHES = 128  # of a signature: more bands find little, and more rows need many more bands
RECALL = 0.997  # of pairs whose similarity is the threshold: 20 bands of 6 rows at 0.8
NO_KEY = 0  # of a document without words
MIX = np.uint64(0x9E3779B97F4A7C15)
BATCH_SHINGLES = 1 << 20  # signed at a time: 8 MB

# Components of up to this many documents are compared pair by pair; an index pays beyond
SMALL = 12
# Bounds of the work on one document of a large component
MAX_COMPARISONS = 64
MAX_INDEX_ENTRIES = 50_000
CACHE_BYTES = 64 << 20  # of shingles that are compared again and again
LEVEL_RATIO = 4
EPSILON = 1e-9  # of overlaps: a rounding error must not exclude a pair


# A call, because the field that issue and users call "kept" names no other value
class Duplicate(NamedTuple):
    removed: int
    kept: int
    similarity: float


Duplicate.__doc__ = "A removed document, the one that stands for it, and their exact similarity."


class Bands(NamedTuple):
    """A signature of ``count`` bands with ``rows`` values each."""

    count: int
    rows: int


@dataclass(frozen=True)
class DocumentGroups:
    """Sets of documents: ``members[starts[i] : starts[i + 1]]`` is set i. int64."""

    members: np.ndarray
    starts: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.members[a:b] for a, b in zip(self.starts[:-1], self.starts[1:]))

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Resolution:
    """The result of `resolve`. ``clusters``, ``sizes``: for each document of the component, the
    smallest number of a document in its cluster, and how many documents the cluster has.
    ``limited``: how many documents remain that were not compared with all possible duplicates.
    """

    duplicates: list[Duplicate]
    clusters: np.ndarray
    sizes: np.ndarray
    limited: int


@cache
def bands(threshold: float) -> Bands:
    """Return the bands of a threshold: the most rows (the fewest wrong candidates) with which at
    most MAX_HASHES values find a pair at the threshold with probability RECALL.

    InputError: a threshold outside 0.1 to 1.
    """
    if not 0.1 <= threshold <= 1:
        raise InputError(f"threshold: expected 0.1 to 1, got {threshold}")
    if threshold == 1:
        return Bands(1, MAX_HASHES)
    counts = {r: ceil(log(1 - RECALL) / log1p(-(threshold**r))) for r in range(1, MAX_HASHES)}
    rows = max(rows for rows, count in counts.items() if rows * count <= MAX_HASHES)
    return Bands(counts[rows], rows)


def band_keys(sets: Iterable[np.ndarray], threshold: float = THRESHOLD) -> np.ndarray:
    """Return the keys of the bands of each set of `shingles`: uint64 (documents, bands).

    Two sets with similarity s share the key of a band with probability s^rows. NO_KEY, which groups
    nothing, stands for an empty set.
    """
    size = bands(threshold)
    batch, total, keys = [], 0, []
    for array in sets:
        batch.append(array)
        total += len(array)
        if total >= BATCH_SHINGLES:
            keys.append(_batch_keys(batch, size))
            batch, total = [], 0
    keys.append(_batch_keys(batch, size))
    return np.concatenate(keys)


def _batch_keys(sets: list[np.ndarray], size: Bands) -> np.ndarray:
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    keys = np.full((len(sets), size.count), NO_KEY, np.uint64)
    full = np.array([len(array) > 0 for array in sets], bool)
    if not full.any():
        return keys
    ends = np.cumsum([len(array) for array in sets if len(array)], dtype=np.uint64)
    offsets = np.concatenate((np.zeros(1, np.uint64), ends))
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), offsets, size.count * size.rows, SEED
    )
    values = np.array(matrix.to_rows(), np.uint64).reshape(-1, size.count, size.rows)
    hashes = np.zeros(values.shape[:2], np.uint64) + np.arange(1, size.count + 1, dtype=np.uint64)
    for row in range(size.rows):
        hashes = (hashes ^ values[:, :, row]) * MIX
        hashes ^= hashes >> np.uint64(29)
    keys[full] = np.maximum(hashes, np.uint64(NO_KEY + 1))
    return keys


def candidate_groups(keys: np.ndarray, documents: np.ndarray) -> DocumentGroups:
    """Return the sets of documents that share a key.

    Args:
        keys: uint64, the keys of one hash partition: every record of a key must be in it.
        documents: integers, the number of the document of each key.

    The members of a set ascend. Memory: about 40 bytes a record.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order].astype(np.int64)
    is_start = np.ones(len(keys), bool)
    is_start[1:] = keys[1:] != keys[:-1]
    is_new = is_start.copy()
    is_new[1:] |= documents[1:] != documents[:-1]
    is_new &= keys != NO_KEY
    keys, documents, is_start = keys[is_new], documents[is_new], is_start[is_new]
    starts = np.append(np.flatnonzero(is_start), len(keys))
    sizes = np.diff(starts)
    members = documents[np.repeat(sizes > 1, sizes)]
    sizes = sizes[sizes > 1]
    return DocumentGroups(members, np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes))))


def components(groups: Iterable[DocumentGroups]) -> DocumentGroups:
    """Return the connected components of documents that share a group, each ascending, ordered by
    their smallest document.

    ``groups`` has the groups of each partition; one partition is in memory at a time, and
    16 bytes for each document in a group.
    """
    documents = labels = np.empty(0, np.int64)  # label: the smallest document of a component
    for part in groups:
        if len(part):
            first = np.repeat(part.members[part.starts[:-1]], np.diff(part.starts))
            documents, labels = _connect(
                np.concatenate((documents, part.members)), np.concatenate((labels, first))
            )
    order = np.lexsort((documents, labels))
    labels = labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=-1, append=-1))
    if not len(labels):
        starts = np.zeros(1, np.int64)
    return DocumentGroups(documents[order], starts)


def _connect(documents: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents of the edges (documents[i], others[i]), sorted, and for each the
    smallest document of its component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = np.unique(np.concatenate((documents, others)))
    edges = np.searchsorted(nodes, documents), np.searchsorted(nodes, others)
    graph = coo_array((np.ones(len(documents), np.int8), edges), (len(nodes), len(nodes)))
    count, labels = connected_components(graph, directed=False)
    smallest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(smallest, labels, nodes)
    return nodes, smallest[labels]


def resolve(
    documents: np.ndarray,
    lengths: np.ndarray,
    get_shingles: Callable[[int], np.ndarray],
    threshold: float = THRESHOLD,
    *,
    earlier: int = 0,
) -> Resolution:
    """Remove the near duplicates of one component.

    Args:
        documents: the numbers of the documents, each once, in any order.
        lengths: the number of `shingles` of each. The document with more of them remains.
        get_shingles: returns the `shingles` of a document by its number. It is called twice for
            each document, and again for those that no longer are in a cache of 64 MB.
        threshold: the smallest similarity at which a document is removed.
        earlier: documents with a smaller number belong to earlier builds, and always remain.

    A document stands in `Duplicate` beside the most similar one that remains. A cluster has the
    documents that are connected by comparisons that reach the threshold. These are comparisons with
    documents that remain: of these, two in the same cluster have a removed one in common.

    In a component of more than SMALL documents an index of the rarest shingles (the prefix filter
    of Chaudhuri, Ganti, Kaushik 2006, with the positions of PPJoin, Xiao et al. 2008) proposes what
    is compared. It loses no pair, within bounds: a document is compared with at most
    MAX_COMPARISONS others, those with the most rare shingles in common, and at most
    MAX_INDEX_ENTRIES entries are read for it. So work is linear in the number of documents.
    Memory: 16 MB, the cache, and for documents that remain 16 bytes for each shingle of a prefix
    that two documents have: at most 20 % of the shingles at threshold 0.8.
    """
    documents, lengths = np.asarray(documents, np.int64), np.asarray(lengths, np.int64)
    order = np.lexsort((documents, -lengths, documents >= earlier))
    numbers, sizes = documents[order], lengths[order]
    cached = _ShingleCache(numbers, get_shingles)
    first_new = int(np.searchsorted(numbers >= earlier, True)) if earlier else 0
    if len(documents) <= SMALL:
        index = _AllPairs(sizes, threshold)
    else:
        index = _PrefixIndex(sizes, threshold, cached, first_new > 0)
    duplicates, parents, limited = [], np.arange(len(documents)), 0
    for rank in range(len(documents)):
        if rank < first_new:
            index.add(rank)
            continue
        candidates, is_limited = index.candidates(rank)
        similar = [
            (similarity, -other)
            for other in candidates
            if (similarity := jaccard(cached[rank], cached[other])) >= threshold
        ]
        if not similar:
            limited += is_limited
            index.add(rank)
            continue
        similarity, other = max(similar)
        duplicates.append(Duplicate(int(numbers[rank]), int(numbers[-other]), float(similarity)))
        for _, other in similar:
            _join(parents, rank, -other)
    roots = np.array([_root(parents, rank) for rank in range(len(documents))], np.int64)
    clusters, sizes_of_clusters = _number(roots, numbers)
    back = np.argsort(order)
    duplicates.sort()
    return Resolution(duplicates, clusters[back], sizes_of_clusters[back], limited)


def _root(parents: np.ndarray, node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = int(parents[node])
    return node


def _join(parents: np.ndarray, a: int, b: int) -> None:
    parents[_root(parents, a)] = _root(parents, b)


def _number(roots: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each document the smallest number and the size of its cluster."""
    smallest = np.full(len(roots), np.iinfo(np.int64).max)
    np.minimum.at(smallest, roots, numbers)
    return smallest[roots], np.bincount(roots, minlength=len(roots))[roots]


class _ShingleCache:
    """The shingles of documents by rank; the last CACHE_BYTES are in memory."""

    def __init__(self, numbers: np.ndarray, get_shingles: Callable[[int], np.ndarray]):
        self._numbers, self._get = numbers, get_shingles
        self._arrays: dict[int, np.ndarray] = {}  # the oldest first
        self._bytes = 0

    def __getitem__(self, rank: int) -> np.ndarray:
        array = self._arrays.pop(rank, None)
        if array is None:
            array = self._get(int(self._numbers[rank]))
            self._bytes += array.nbytes
            while self._bytes > CACHE_BYTES and self._arrays:
                self._bytes -= self._arrays.pop(next(iter(self._arrays))).nbytes
        self._arrays[rank] = array
        return array


class _AllPairs:
    """Proposes all documents that were added and have a similar size."""

    def __init__(self, sizes: np.ndarray, threshold: float):
        self._sizes, self._threshold = sizes.tolist(), threshold
        self._ranks: list[int] = []

    def add(self, rank: int) -> None:
        self._ranks.append(rank)

    def candidates(self, rank: int) -> tuple[list[int], bool]:
        size, sizes = self._sizes[rank], self._sizes
        low, high = size * self._threshold - EPSILON, size / self._threshold + EPSILON
        return [other for other in self._ranks if low <= sizes[other] <= high], False


class _Level(NamedTuple):
    """Entries of an index, sorted by (shingle, rank)."""

    shingles: np.ndarray  # uint64
    ranks: np.ndarray  # int32
    positions: np.ndarray  # int32: of the shingle in the order of the document's shingles


class _PrefixIndex:
    """Proposes documents that were added and share a rare shingle.

    Shingles are ordered by (approximate number of documents, hash). Two sets whose similarity is T
    or more share one of the first |X| - ceil(T |X|) + 1 shingles of each, and of the smaller set
    even one of the first |X| - ceil(2T / (1 + T) |X|) + 1. Shingles of a single document are not
    stored. Entries are in levels of sorted arrays, each at least LEVEL_RATIO times as large as the
    next, so that an entry is sorted a few times only.
    """

    def __init__(self, sizes: np.ndarray, threshold: float, cached: _ShingleCache, any_order: bool):
        self._sizes, self._threshold, self._cached = sizes, threshold, cached
        self._probe_overlap = threshold if any_order else 2 * threshold / (1 + threshold)
        bits = min(max(int(sizes.sum()).bit_length(), 10), 22)  # at most 16 MB of counts
        self._shift = np.uint64(64 - bits)
        self._counts = np.zeros(1 << bits, np.uint32)
        for rank in range(len(sizes)):
            self._counts[cached[rank] >> self._shift] += 1
        self._levels: list[_Level] = []

    def _prefix(self, rank: int, overlap: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the shingles of a prefix that other documents have, and their positions."""
        array = self._cached[rank]
        frequency = self._counts[array >> self._shift]
        length = _prefix_length(len(array), overlap)
        first = np.argsort(frequency, kind="stable")[:length]
        positions = np.flatnonzero(frequency[first] > 1)
        return array[first[positions]], positions.astype(np.int32)

    def add(self, rank: int) -> None:
        hashes, positions = self._prefix(rank, self._threshold)
        if not len(hashes):
            return
        parts = [_Level(hashes, np.full(len(hashes), rank, np.int32), positions)]
        size = len(hashes)
        while self._levels and len(self._levels[-1].ranks) < LEVEL_RATIO * size:
            parts.append(self._levels.pop())
            size += len(parts[-1].ranks)
        columns = [np.concatenate(column) for column in zip(*parts)]
        order = np.lexsort((columns[1], columns[0]))
        self._levels.append(_Level(*(column[order] for column in columns)))

    def candidates(self, rank: int) -> tuple[list[int], bool]:
        hashes, positions = self._prefix(rank, self._probe_overlap)
        max_entries = max(1, MAX_INDEX_ENTRIES // max(1, len(hashes)))
        size, ratio = self._sizes[rank], self._threshold / (1 + self._threshold)
        others, is_limited = [np.empty(0, np.int32)], False
        for level in self._levels:
            first, last = (np.searchsorted(level.shingles, hashes, s) for s in ("left", "right"))
            lengths = np.minimum(last - first, max_entries)
            is_limited |= bool((lengths < last - first).any())
            # the last entries of each shingle: those of the most similar size
            shifts = last - lengths - (np.cumsum(lengths) - lengths)
            entries = np.repeat(shifts, lengths) + np.arange(lengths.sum())
            ranks = level.ranks[entries]
            sizes = self._sizes[ranks]
            overlap = np.minimum(
                size - np.repeat(positions, lengths), sizes - level.positions[entries]
            )
            others.append(ranks[overlap >= ratio * (size + sizes) - EPSILON])
        ranks, counts = np.unique(np.concatenate(others), return_counts=True)
        if len(ranks) > MAX_COMPARISONS:
            ranks = ranks[np.lexsort((-ranks, -counts))[:MAX_COMPARISONS]]
            is_limited = True
        return ranks.tolist(), is_limited


def _prefix_length(size: int, overlap: float) -> int:
    return size - ceil(overlap * size - EPSILON) + 1 if size else 0


def find(
    texts: Sequence[str], threshold: float = THRESHOLD, *, earlier: int = 0
) -> list[Duplicate]:
    """Return the texts that are near duplicates of texts that remain, by index, ascending.

    Args:
        texts: plain text. One without a word is no duplicate.
        threshold: the smallest exact Jaccard similarity of word 5-grams at which a text is removed.
            Of pairs at the threshold, 0.997 are found.
        earlier: how many texts at the start are never removed, such as those of an earlier build.

    Of two texts the one with fewer distinct 5-grams is removed, else the later one. The result is a
    function of the texts alone. Memory: 8 bytes a word, and 250 a text. InputError: a threshold
    outside 0.1 to 1, ``earlier`` outside the texts, not a list of texts.
    """
    if isinstance(texts, str):
        raise InputError(f"texts: expected a list of texts, got the text {texts!r:.40}")
    check_type(texts, "texts", Sequence, "a list of texts")
    for number, text in enumerate(texts):
        check_type(text, f"texts[{number}]", str, "a text")
    if not 0 <= earlier <= len(texts):
        raise InputError(f"earlier: expected 0 to {len(texts)}, the number of texts, got {earlier}")
    sets = [shingles(text) for text in texts]
    lengths = np.array([len(array) for array in sets], np.int64)
    keys = band_keys(sets, threshold)
    documents = np.repeat(np.arange(len(texts)), keys.shape[1])
    groups = candidate_groups(keys.ravel(), documents)
    duplicates = []
    for members in components([groups]):
        resolution = resolve(
            members, lengths[members], sets.__getitem__, threshold, earlier=earlier
        )
        duplicates += resolution.duplicates
    return sorted(duplicates)
