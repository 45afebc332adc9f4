"""Append-only, crash-safe JSONL of per-question records.

The first line has the task, the model and the options; each further line is the record of one
question. Lines are appended in chunks and synced. An incomplete last line, left by a kill, is
dropped.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import make_folder, open_regular, write_error
from fastlm.schema import parse

Record = dict[str, Any]
MAX_BYTES = 2**32  # of a file, which is read into memory
# Increased when a change of scorer, judge or prompt changes records
VERSION = 3
RESTART_HINT = "remove the file to begin again"


class RecordFile:
    """The records at ``path``, in the order in which they were added.

    Args:
        metadata: what records depend on: the hash of the questions, the model, the options. A file
            with other metadata, or of another `VERSION`, is refused.
        schema: of a record (`fastlm.schema`).
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any], schema: Any = Record):
        self.path, self.metadata = Path(path), {**metadata, "version": VERSION}
        self.records: list[Record] = []
        self._ends: list[int] = []  # bytes up to the end of each line
        make_folder(self.path.parent)
        try:
            if self.path.exists():
                self._read(schema)
            # unbuffered: close does not write again what a full disk refused
            self.file = open(self.path, "r+b" if self._ends else "wb", buffering=0)
            self._cut()
        except OSError as error:
            raise write_error(self.path, error) from error
        if not self._ends:
            self._append([self.metadata])

    def _read(self, schema: Any) -> None:
        """Read the complete lines of the file."""
        with open_regular(self.path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{self.path}: expected at most {MAX_BYTES:,} bytes, got more")
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        self._ends = [*accumulate(map(len, lines))]
        for number, line in enumerate(lines, 1):
            try:
                record = parse(line, schema if number > 1 else Record, f"{self.path}:{number}")
            except InputError as error:
                raise InputError(f"{error}; {RESTART_HINT}") from None
            if number > 1:
                self.records.append(record)
            elif record != self.metadata:
                raise InputError(
                    f"{self.path}:1: expected records of {self.metadata}, got those of"
                    f" {record!r:.200}; {RESTART_HINT}"
                )

    def add(self, records: Sequence[Record]) -> None:
        """Append records; they are on disk when this returns."""
        self._append(records)
        self.records += records

    def remaining_chunks(self, count: int, size: int) -> range:
        """Drop the records of an incomplete chunk, and return the starts of the chunks that are
        missing from ``count`` records. A chunk is always run as a whole, so that its records are
        bitwise the same.

        InputError: there are more than ``count`` records.
        """
        done = len(self.records)
        if done > count:
            raise InputError(
                f"{self.path}: expected at most {count:,} records, got {done:,}; {RESTART_HINT}"
            )
        if done < count and done % size:
            done -= done % size
            del self.records[done:], self._ends[done + 1 :]
            self._cut()
        return range(done, count, size)

    def _cut(self) -> None:
        """Truncate the file after the last known line."""
        end = self._ends[-1] if self._ends else 0
        self.file.truncate(end)
        self.file.seek(end)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        encoded = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
        ends = [*accumulate(map(len, encoded), initial=self.file.tell())][1:]
        left = memoryview(b"".join(encoded))
        try:
            while left:
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error
        self._ends += ends

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
