"""Labels of judged answers: which answers a person labels, and which labels measure the judge.

Half of the answers to label are a random sample, half are those of which the judge is least sure.
Labels of the second half find faults of a rubric, but they are not a sample of the answers: a judge
errs more often there. So only the random half measures the judge.

The rows of grades.jsonl are in a random order, which a larger --limit continues. The random sample
is the beginning of this order: its blocks of `BLOCK` answers, up to the first block that lacks a
label (`random_labels`). It follows from the answers alone, so that labels may come from any file,
in any order and from several sessions. An answer of the second half that the beginning reaches
later is then a part of the sample; leaving it out would leave out the answers that are hard to
judge. Without blocks, the sample would end before the first answer without a label. Whether one
more answer counts would then depend on how hard it is to judge, because the second half labels hard
ones.
"""

import fcntl
import json
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.judge.grading import GradedItem
from fastlm.evals.judge.rubric import Rubric
from fastlm.evals.judge.scale import Grade
from fastlm.files import make_folder, write_error
from fastlm.schema import Name, parse, read_lines

ROW_START = b'{"id": "'  # of a row of a label file
BLOCK = 10  # a rater who ends early loses at most nine labels of the sample


class RaterLabel(TypedDict):
    """A rater's label of an answer, None: the rater skipped it. ``rubric``: `Rubric.key`."""

    id: Annotated[str, MinLen(1)]
    rater: Name
    label: Grade | None
    rubric: str


def read_label_rows(path: Path, rubric: Rubric) -> dict[tuple[str, str], Grade | None]:
    """Return (id, rater) -> the last label. InputError: a bad row, a label by another rubric."""
    return _last_labels(path, read_lines(path, RaterLabel), rubric)


def _last_labels(
    path: Path, rows: Iterable[tuple[int, RaterLabel]], rubric: Rubric
) -> dict[tuple[str, str], Grade | None]:
    labels: dict[tuple[str, str], Grade | None] = {}
    for number, row in rows:
        if row["rubric"] != rubric.key:
            raise InputError(
                f"{path}:{number}: rubric: expected a label by the judge's rubric {rubric.key}, got"
                f" one by {row['rubric']!r:.40}: label the answers again, in another file"
            )
        if row["label"] is not None and row["label"] not in rubric.grades:
            expected = ", ".join(map(str, rubric.grades))
            raise InputError(
                f"{path}:{number}: label: expected one of {expected}, got {row['label']!r:.80}"
            )
        labels[row["id"], row["rater"]] = row["label"]
    return labels


def merge_raters(
    labels: Mapping[tuple[str, str], Grade | None],
) -> dict[str, Grade | None]:
    """Return id -> the label of most raters; None if they are split, or all skipped it."""
    votes: dict[str, Counter[Grade]] = {}
    for (id, _), label in labels.items():
        counts = votes.setdefault(id, Counter())
        if label is not None:
            counts[label] += 1
    merged: dict[str, Grade | None] = {}
    for id, counts in votes.items():
        (best, count), *others = counts.most_common(2) or [(None, 0)]
        merged[id] = None if others and others[0][1] == count else best
    return merged


def random_order(ids: Iterable[str]) -> list[str]:
    """Return the ids in the order of their hashes."""
    return sorted(ids, key=lambda id: _hash("random order", id))


def _hash(purpose: str, id: str) -> bytes:
    return blake2b(f"{purpose} {id}".encode()).digest()


def random_labels(ids: Iterable[str], labels: Mapping[str, Grade | None]) -> dict[str, Grade]:
    """Return the labels of the random sample of ``ids``, which are in random order: those of the
    blocks at the beginning, up to the first block with an id without a label. Skipped ones are left
    out."""
    order = [*ids]
    sample: dict[str, Grade] = {}
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        if any(id not in labels for id in block):
            break
        sample |= {id: label for id in block if (label := labels[id]) is not None}
    return sample


def label_order(graded: Sequence[GradedItem], rubric: Rubric, count: int) -> list[GradedItem]:
    """Return ``count`` items to label, of items in random order: half of them (whole blocks) of the
    random sample, and those of the rest of which the judge is least sure. Coin flips mix the
    two, so that the order does not reveal the half."""
    order = [g for g in graded if g.grade is not None]
    size = min(count, BLOCK * math.ceil(count / 2 / BLOCK))
    sample, rest = order[:size], order[size:]
    # between equals another order decides: the random one would complete further blocks with them
    unsure = sorted(rest, key=lambda g: (confidence_key(g, rubric), _hash("equals", g.item.id)))
    del unsure[count - size :]
    mixed, coins = [], random.Random(0)
    while sample and unsure:
        mixed.append((sample if coins.random() < 0.5 else unsure).pop(0))
    return mixed + sample + unsure


def confidence_key(graded: GradedItem, rubric: Rubric) -> tuple[float, float]:
    """Return a key that sorts items by the judge's confidence, the least sure first: pairs whose
    two orders disagree, grades next to the threshold, then the judge's own probability."""
    distance = float(graded.is_consistent)
    if isinstance(graded.grade, int):
        distance = abs(graded.grade - (rubric.threshold - 0.5))
    return distance, 1.0 if graded.probability is None else graded.probability


def _is_fragment(line: bytes) -> bool:
    """Return whether a line is the beginning of a row of `LabelFile.add`, but not all of it."""
    if not line or line[: len(ROW_START)] != ROW_START[: len(line)]:
        return False
    try:
        json.loads(line)
    except RecursionError:  # nested too deeply for a label
        return False
    except ValueError:
        return True
    return False


class LabelFile:
    """Raters' labels in a JSONL file, to which other processes may add at the same time: each
    locks the file while it reads or writes. A label is on disk when `add` returns; threads may call
    all methods. An incomplete last line, left by a kill, is dropped. A file with anything else than
    labels is refused and stays as it is.
    """

    def __init__(self, path: Path, rubric: Rubric) -> None:
        self.path, self.rubric = path, rubric
        self._thread_lock = threading.Lock()
        self._labels: dict[tuple[str, str], Grade | None] = {}
        self._end = self._line_count = 0  # of what was read
        make_folder(path.parent)
        try:
            with ExitStack() as stack:
                self._file = stack.enter_context(open(path, "a+b", buffering=0))
                self.read()
                stack.pop_all()  # it stays open
        except OSError as error:
            raise write_error(path, error) from error

    def read(self) -> dict[tuple[str, str], Grade | None]:
        """Return (id, rater) -> the last label in the file."""
        with self._locked():
            self._read()
            return {**self._labels}

    def add(self, rater: str, id: str, label: Grade | None) -> None:
        row: RaterLabel = {"id": id, "rater": rater, "label": label, "rubric": self.rubric.key}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._locked():
            self._read()
            try:
                self._write(line)
            except OSError:
                self._file.truncate(self._end)  # the next label begins a line
                raise
            self._labels[id, rater] = label
            self._end += len(line)
            self._line_count += 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Context: no other thread or process reads or writes. InputError: the system refuses."""
        with self._thread_lock:
            try:
                self._reopen()
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(self._file, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    with suppress(OSError):
                        fcntl.flock(self._file, fcntl.LOCK_UN)
            except OSError as error:
                raise write_error(self.path, error) from error

    def _reopen(self) -> None:
        """Open the file again if an editor has put another one in its place."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return
        file = open(self.path, "a+b", buffering=0)
        self._file.close()
        self._file = file
        self._labels, self._end, self._line_count = {}, 0, 0

    def _read(self) -> None:
        """Read what was added, and end the last line of the file or drop its fragment."""
        if self._file.seek(0, os.SEEK_END) < self._end:  # somebody deleted lines
            self._labels, self._end, self._line_count = {}, 0, 0
        self._file.seek(self._end)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        is_fragment = _is_fragment(data[end:])
        lines = data[: end if is_fragment else None].splitlines()
        rows = (
            (number, parse(line, RaterLabel, f"{self.path}:{number}"))
            for number, line in enumerate(lines, self._line_count + 1)
            if line.strip()
        )
        self._labels |= _last_labels(self.path, rows, self.rubric)
        if is_fragment:
            self._file.truncate(self._end + end)
        elif end < len(data):
            self._write(b"\n")
        self._end = self._file.seek(0, os.SEEK_END)
        self._line_count += len(lines)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
