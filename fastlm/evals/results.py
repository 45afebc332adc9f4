"""What a model said to each question of a task, in a file that survives a kill.

The first line tells what was asked of which model; each further line is one question's record.
Lines are appended a part at a time and synced; a last line that a kill has cut is dropped.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from fastlm.errors import InputError
from fastlm.files import make_folder, open_regular, write_error
from fastlm.schema import parse

Item = TypeVar("Item")
Record = dict[str, Any]
MAX_BYTES = 2**32  # of a file: it is read whole
# Raised when fastlm says something else of the same question: another scorer, judge or prompt
VERSION = 3


class Results:
    """The records at ``path``, in the order in which they were added.

    Args:
        about: what makes records comparable: the hash of the questions, the model, the options.
            A file about something else, or of another `VERSION`, is refused.
        schema: of a record (`fastlm.schema`).
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any], schema: Any = Record):
        self.path, self.about = Path(path), {**about, "version": VERSION}
        self.schema = schema
        self.records: list[Record] = []
        self._begin = 0  # bytes of the first line
        self._ends: list[int] = []  # bytes up to the end of each record
        make_folder(self.path.parent)
        try:
            whole = self._read() if self.path.exists() else 0
            # without a buffer: what a full disk refused is not written again by close
            self.file = open(self.path, "r+b" if whole else "wb", buffering=0)
            self.file.truncate(whole)
            self.file.seek(whole)
        except OSError as error:
            raise write_error(self.path, error) from error
        if not whole:
            (self._begin,) = self._append([self.about])

    def _read(self) -> int:
        """Take the whole lines of the file; return their bytes."""
        with open_regular(self.path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{self.path}: expected at most {MAX_BYTES:,} bytes, got more")
        whole = data.rfind(b"\n") + 1
        end = 0
        for number, line in enumerate(data[:whole].splitlines(keepends=True), 1):
            end += len(line)
            try:
                record = parse(line, self.schema if number > 1 else Record, f"{self.path}:{number}")
            except InputError as error:
                raise InputError(f"{error}; remove the file to begin again") from None
            if number > 1:
                self.records.append(record)
                self._ends.append(end)
            elif record == self.about:
                self._begin = end
            else:
                raise InputError(
                    f"{self.path}:1: expected records of {self.about}, got those of"
                    f" {record!r:.200}; remove the file to begin again"
                )
        return whole

    def add(self, records: Sequence[Record]) -> None:
        """Append records; they are on disk when this returns."""
        self._ends += self._append(records)
        self.records += records

    def fill(
        self,
        items: Sequence[Item],
        ask: Callable[[int, Sequence[Item]], Sequence[Record]],
        *,
        part: int,
        track: Callable[[range], Iterable[int]] = iter,
    ) -> list[Record]:
        """Return a record per item; those that are missing are asked for, and kept, ``part`` at
        once.

        A part that was cut off is asked again as a whole, in the same batches, so its records have
        the same bits. ``ask`` gets the index of a part's first item and the part. ``track`` shows
        progress over the parts; it is not called where nothing is missing.
        """
        done = len(self.records)
        if done > len(items):
            raise InputError(
                f"{self.path}: expected at most {len(items):,} records, got {done:,}; remove the"
                " file to begin again"
            )
        if done < len(items):
            self.keep(done - done % part)
            for at in track(range(len(self.records), len(items), part)):
                self.add(ask(at, items[at : at + part]))
        return self.records

    def keep(self, count: int) -> None:
        """Drop all but the first ``count`` records."""
        if count < len(self.records):
            del self.records[count:], self._ends[count:]
            end = self._ends[-1] if self._ends else self._begin
            self.file.truncate(end)
            self.file.seek(end)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return where each line ends."""
        encoded = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
        ends = list(accumulate(map(len, encoded), initial=self.file.tell()))[1:]
        left = memoryview(b"".join(encoded))
        try:
            while left:
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error
        return ends

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
