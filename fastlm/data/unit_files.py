"""The files that the steps of preparing text pass to each other (`fastlm.data.steps`).

A document has a number: its unit of input in the upper 32 bits, its position in the unit in the
lower ones. A smaller number is earlier.
"""

import io
import json
import os
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from fastlm.data.clean import Removal
from fastlm.pipeline.units import Work
from fastlm.sources.document import Document
from fastlm.sources.streams import ZSTD_MAGIC, compressed

ROWS, REMOVED = "rows.jsonl.zst", "removed.jsonl.zst"
# What is known of each text that was extracted. size: bytes of the clean text; shingles: how many
# the text has, for near duplicates; passed: it passed everything that depends on it alone
DOCUMENT = np.dtype(
    [("size", "<u4"), ("extracted", "<u4"), ("shingles", "<u4"), ("passed", "?")]
)  # fmt: skip


@dataclass
class Counts:
    """What one unit counts for the funnel; JSON-serialisable by `to_json`."""

    remaining: Counter[str] = field(default_factory=Counter)  # "STEP documents", "STEP bytes"
    removed: dict[str, Counter[str]] = field(default_factory=dict)  # by step and reason
    extra: dict[str, Counter[str]] = field(default_factory=dict)  # "replaced", "cut", ...
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    mixture: dict[str, Counter[str]] = field(default_factory=dict)  # by "sources NAME", ...
    messages: list[str] = field(default_factory=list)  # about input that could not be read

    def keep(self, step: str, size: int) -> None:
        self.remaining[f"{step} documents"] += 1
        self.remaining[f"{step} bytes"] += size

    def remove(self, step: str, reason: str, count: int = 1) -> None:
        self.removed.setdefault(step, Counter())[reason] += count

    def add(self, name: str, counts: Mapping[str, int]) -> None:
        self.extra.setdefault(name, Counter()).update(counts)

    def add_to_source(self, source: str, **counts: int) -> None:
        self.sources.setdefault(source, Counter()).update(counts)

    def mix(self, name: str, keys: Mapping[str, str], size: int) -> None:
        """Count a document by its source, language and bucket, as ``name``."""
        for table, key in keys.items():
            tally = self.mixture.setdefault(f"{table} {key}", Counter())
            tally[f"{name} documents"] += 1
            tally[f"{name} bytes"] += size

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def update(self, counts: Mapping[str, Any]) -> None:
        """Add what another unit counted."""
        self.remaining.update(counts["remaining"])
        for totals, values in (
            (self.removed, counts["removed"]), (self.extra, counts["extra"]),
            (self.sources, counts["sources"]), (self.mixture, counts["mixture"]),
        ):  # fmt: skip
            for name, inner in values.items():
                totals.setdefault(name, Counter()).update(inner)
        self.messages += counts["messages"]


class JsonLines:
    """A writer of JSON lines."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream

    def write(self, row: Mapping[str, Any]) -> None:
        # "replace": lone surrogates in the metadata are no legal text either
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
        self._stream.write(line + b"\n")


@contextmanager
def json_lines(path: Path) -> Iterator[JsonLines]:
    """Context: yield a writer of compressed JSON lines."""
    with open(path, "wb") as file, compressed(file, ZSTD_MAGIC) as stream:
        yield JsonLines(stream)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of `json_lines`."""
    return map(json.loads, raw_lines(path))


def raw_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, closefd=False)
        yield from io.BufferedReader(stream)  # type: ignore[arg-type]


def document_row(document: Document) -> dict[str, Any]:
    return {
        "text": document.text, "id": document.id, "source": document.source, "meta": document.meta
    }  # fmt: skip


def removal_record(row: Mapping[str, Any], removal: Removal, text: str = "") -> dict[str, Any]:
    """Return the record of a removed document (`fastlm.data.corpus.RemovedRecord`)."""
    return {
        "id": row["id"], "source": row["source"], "url": row.get("meta", {}).get("url"),
        "step": removal.step, "reason": removal.reason, "detail": removal.detail or None,
        "text": text,
    }  # fmt: skip


def save_names(out: Path, documents: list[tuple[str, str]]) -> None:
    """Write the (source, id) of each document, for `load_name`."""
    names = [json.dumps(document).encode() for document in documents]
    (out / "names.bin").write_bytes(b"".join(names))
    np.save(out / "name_ends.npy", np.cumsum([len(name) for name in names], dtype="<u8"))


def load_name(work: Work, document: int) -> tuple[str, str]:
    """Return (source, id) of a document by its number."""
    unit, position = document >> 32, document & 0xFFFFFFFF
    ends = load(work, "read", unit, "name_ends")
    start = int(ends[position - 1]) if position else 0
    with open(work.path("read", unit, "names.bin"), "rb") as file:
        file.seek(start)
        name = file.read(int(ends[position]) - start)
    source, id = json.loads(name)
    return source, id


def save_sorted(out: Path, name: str, keys: np.ndarray, positions: np.ndarray) -> None:
    """Write records (key, position) in order: ``NAME_key.npy``, ``NAME_position.npy``."""
    order = np.lexsort((positions, keys))
    np.save(out / f"{name}_key.npy", keys[order].astype("<u8"))
    np.save(out / f"{name}_position.npy", positions[order].astype("<u4"))


def load(work: Work, step: str, unit: int, name: str) -> np.ndarray:
    """Map an array that a finished unit wrote."""
    return np.load(work.path(step, unit, f"{name}.npy"), mmap_mode="r")


def save_rows(out: Path, name: str, *columns: np.ndarray) -> None:
    """Write rows about documents, (number, ...), uint64, in the order of their numbers."""
    rows = np.stack([column.astype("<u8") for column in columns], 1)
    np.save(out / f"{name}.npy", rows[np.lexsort((rows[:, -1], rows[:, 0]))])


def rows_of_unit(work: Work, step: str, name: str, unit: int) -> np.ndarray:
    """Return the rows of `save_rows` about documents of one unit, from all units of ``step``."""
    slices = []
    for number in range(work.parameters(step)["units"]):
        rows = load(work, step, number, name)
        # bisect reads a few of the numbers, searchsorted would copy all of them for every unit
        first, last = (bisect_left(rows[:, 0], unit + n << 32) for n in (0, 1))
        slices.append(np.array(rows[first:last]))
    return np.concatenate(slices)


def outputs_of(work: Work) -> range:
    """Return the units of input whose documents are written: not those of earlier builds."""
    return range(work.plan["earlier_units"], work.parameters("exact")["inputs"])


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
