"""The steps of preparing text that compare all documents, each divided by hash.

    exact        of the documents with the same text all but the first go
    groups       the documents that share a key of a MinHash band
    components   connected components of these groups
    shingles     (a unit of input) the shingles of its documents in components
    near         some components: exact comparison decides what goes
    paragraphs   of a paragraph all but the first occurrence go

A unit of ``exact``, ``groups`` and ``paragraphs`` is a range of hashes. It reads the keys in its
range from the files of all ``read`` units, where they are one slice, and sorts them. How many
ranges there are follows from the memory, and has no effect on the result.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.corpus import read_documents
from fastlm.data.near_duplicates import DocumentGroups, candidate_groups, resolve
from fastlm.data.near_duplicates import components as connected_components
from fastlm.data.plan import options_of_plan, ranges_of_unit
from fastlm.data.shingles import shingles as shingles_of
from fastlm.data.unit_files import ROWS, load, read_lines, rows_of_unit, save_rows
from fastlm.pipeline.units import Work

RECORD_BYTES = 16  # of a key and a document
SORT_FACTOR = 6  # memory of comparing records, as a multiple of their size
MAX_MAPPED_UNITS = 128  # with three files each
PARTS_PER_MILLION = 10**6  # similarities are stored as integers


def ranges_for(records: int, memory: int, workers: int) -> int:
    """Return into how many hash ranges a step is divided, so that ``workers`` of them at once fit
    into ``memory`` bytes.
    """
    return max(1, -(-records * RECORD_BYTES * SORT_FACTOR * workers // memory))


def gathered(work: Work, unit: int) -> np.ndarray:
    """Return the table of the documents of a unit, up to ``max_bytes``."""
    table = load(work, "read", unit, "documents")
    parameters = work.parameters("exact")
    return table[: parameters["last"]] if unit == parameters["inputs"] - 1 else table


def survivors(work: Work, unit: int, *, near: bool) -> np.ndarray:
    """Return which documents of a unit passed alone and are no duplicates, a mask; with ``near``,
    no near duplicates either.
    """
    mask = np.array(gathered(work, unit)["passed"])
    for step in ("exact", "near") if near and has_near(work) else ("exact",):
        mask[_positions(rows_of_unit(work, step, "duplicates", unit)[:, 0])] = False
    return mask


def has_near(work: Work) -> bool:
    return work.has_begun("near")


def _positions(numbers: np.ndarray) -> np.ndarray:
    return (numbers & np.uint64(0xFFFFFFFF)).astype(np.int64)


def exact(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Find the documents whose text an earlier one has, in one range of hashes.

    Writes ``duplicates.npy``: rows (document, the first with this text).
    """
    pieces = []
    for unit, part in _slices(work, "exact", "text", number):
        high, low, positions = (
            load(work, "read", unit, f"text_{name}")[part] for name in ("key", "low", "position")
        )
        inside = positions < len(gathered(work, unit))
        pieces.append((high[inside], low[inside], _numbers(unit, positions[inside])))
    high, low, documents = map(np.concatenate, zip(*pieces))
    order = np.lexsort((documents, low, high))
    high, low, documents = high[order], low[order], documents[order]
    is_new = np.ones(len(high), bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = np.flatnonzero(is_new)[np.cumsum(is_new) - 1]
    save_rows(out, "duplicates", documents[~is_new], documents[first][~is_new])
    return {}


def groups(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Find the documents that share a key of a MinHash band, in one range of keys.

    Writes ``members.npy`` and ``starts.npy`` of `DocumentGroups`.
    """
    keys, documents = _records(work, "groups", "band", number, near=False)
    found_groups = candidate_groups(keys, documents)
    np.save(out / "members.npy", found_groups.members)
    np.save(out / "starts.npy", found_groups.starts)
    return {}


def components(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Connect the groups of all ranges. The step has one unit.

    Writes ``members.npy``, ``starts.npy`` and ``ends.npy``: how many shingles the components up to
    each one have.
    """
    ranges = range(work.parameters("groups")["units"])
    result = connected_components(_load_groups(work, "groups", n) for n in ranges)
    sizes = np.zeros(len(result.members), np.int64)
    units = result.members >> 32
    for unit in np.unique(units).tolist():
        inside = units == unit
        positions = result.members[inside] & 0xFFFFFFFF
        sizes[inside] = load(work, "read", unit, "documents")["shingles"][positions]
    totals = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    np.save(out / "members.npy", result.members)
    np.save(out / "starts.npy", result.starts)
    np.save(out / "ends.npy", totals[result.starts[1:]])
    return {"documents": len(result.members), "shingles": int(totals[-1])}


def _load_groups(work: Work, step: str, number: int) -> DocumentGroups:
    members, starts = (np.array(load(work, step, number, name)) for name in ("members", "starts"))
    return DocumentGroups(members, starts)


def shingles(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Write the shingles of the documents of one unit of input that are in components, in order:
    ``positions.npy``, ``ends.npy``, ``shingles.npy``.
    """
    members = load(work, "components", 0, "members")
    positions = np.sort(members[members >> 32 == number] & 0xFFFFFFFF)
    arrays = []
    if len(positions):
        table = load(work, "read", number, "documents")
        chosen = set(positions.tolist())
        passed = np.flatnonzero(table["passed"]).tolist()
        texts = zip(passed, _texts(work, number))
        arrays = [shingles_of(text) for position, text in texts if position in chosen]
    np.save(out / "positions.npy", positions)
    np.save(out / "ends.npy", np.cumsum([len(a) for a in arrays], dtype=np.int64))
    np.save(out / "shingles.npy", np.concatenate([np.empty(0, np.uint64), *arrays]))
    return {}


def _texts(work: Work, number: int) -> Iterator[str]:
    """Yield the texts of a unit of input that passed."""
    if number < work.plan["earlier_units"]:
        for file, _ in ranges_of_unit(work, number):
            yield from (document.text for document in read_documents(file.path))
    else:
        for row in read_lines(work.path("read", number, ROWS)):
            yield row["text"]


def near(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Remove the near duplicates of some components, by exact comparison.

    Writes ``duplicates.npy``: rows (document, the one that remains, similarity in millionths), and
    ``clusters.npy``: rows (document, its cluster, the cluster's size) for clusters of two or more.
    A cluster has the number of its first document.
    """
    options, parameters = options_of_plan(work.plan), work.parameters("near")
    ends = load(work, "components", 0, "ends")
    starts = load(work, "components", 0, "starts")
    members = load(work, "components", 0, "members")
    total = int(ends[-1]) if len(ends) else 0
    bounds = [total * n // parameters["units"] for n in (number, number + 1)]
    first, last = np.searchsorted(ends, bounds, side="right")
    if number == parameters["units"] - 1:
        last = len(ends)
    shingle_files = _ShingleFiles(work)
    removed, remaining, similarities = [], [], []
    clusters: list[np.ndarray] = [np.empty((3, 0), np.int64)]
    limited = 0
    for index in range(first, last):
        documents = np.array(members[starts[index] : starts[index + 1]])
        lengths = np.array([len(shingle_files[int(document)]) for document in documents])
        resolution = resolve(
            documents, lengths, shingle_files.__getitem__, options.near_duplicates,
            earlier=work.plan["earlier_units"] << 32,
        )  # fmt: skip
        limited += resolution.limited
        for duplicate in resolution.duplicates:
            removed.append(duplicate[0])
            remaining.append(duplicate[1])
            similarities.append(int(duplicate[2] * PARTS_PER_MILLION))
        several = resolution.sizes > 1
        columns = documents, resolution.clusters, resolution.sizes
        clusters.append(np.stack([column[several] for column in columns]))
    save_rows(out, "duplicates", *(np.array(c, "<u8") for c in (removed, remaining, similarities)))
    save_rows(out, "clusters", *np.concatenate(clusters, 1))
    return {"limited": limited}


class _ShingleFiles:
    """The shingles of documents by number, mapped from the files of the step ``shingles``.

    The files of at most `MAX_MAPPED_UNITS` are mapped: each takes a file descriptor, of which many
    systems give a process 1,024.
    """

    def __init__(self, work: Work):
        self._work: Work = work
        self._units: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    def __getitem__(self, document: int) -> np.ndarray:
        unit, position = document >> 32, document & 0xFFFFFFFF
        if unit not in self._units:
            names = "positions", "ends", "shingles"
            self._units[unit] = [load(self._work, "shingles", unit, name) for name in names]
            if len(self._units) > MAX_MAPPED_UNITS:
                self._units.popitem(last=False)
        self._units.move_to_end(unit)
        positions, ends, values = self._units[unit]
        index = int(np.searchsorted(positions, position))
        return np.asarray(values[ends[index - 1] if index else 0 : ends[index]])


def paragraphs(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Find the paragraphs that an earlier document has, in one range of hashes.

    Writes ``repeats.npy``: rows (document, key of the paragraph).
    """
    keys, documents = _records(work, "paragraphs", "paragraph", number, near=True)
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    is_repeat = np.zeros(len(keys), bool)
    is_repeat[1:] = keys[1:] == keys[:-1]
    save_rows(out, "repeats", documents[is_repeat], keys[is_repeat])
    return {}


def _numbers(unit: int, positions: np.ndarray) -> np.ndarray:
    return positions.astype(np.int64) | unit << 32


def _slices(work: Work, step: str, name: str, number: int) -> Iterator[tuple[int, slice]]:
    """Yield for each unit of input where the keys of a hash range are in its sorted keys."""
    count = work.parameters(step)["units"]
    ends = [(n << 64) // count for n in (number, number + 1)]
    for unit in range(work.parameters("exact")["inputs"]):
        keys = load(work, "read", unit, f"{name}_key")
        first = int(np.searchsorted(keys, np.uint64(ends[0])))
        last = len(keys) if ends[1] >> 64 else int(np.searchsorted(keys, np.uint64(ends[1])))
        yield unit, slice(first, last)


def _records(
    work: Work, step: str, name: str, number: int, *, near: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys in a hash range and their documents, of `survivors`."""
    keys, documents = [], []
    for unit, part in _slices(work, step, name, number):
        positions = load(work, "read", unit, f"{name}_position")[part]
        mask = survivors(work, unit, near=near)
        remaining = np.append(mask, False)[np.minimum(positions, len(mask))]
        keys.append(load(work, "read", unit, f"{name}_key")[part][remaining])
        documents.append(_numbers(unit, positions[remaining]))
    return np.concatenate(keys), np.concatenate(documents)
