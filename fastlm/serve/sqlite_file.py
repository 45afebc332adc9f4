"""A SQLite file that one kind of program owns, whose faults are one-line errors.

Several processes may use a file at once: the write-ahead log lets them read while one writes, and
a writer waits up to `WAIT_SECONDS` for another. A transaction is on disk when it ends.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fastlm.errors import InputError
from fastlm.files import reason

WAIT_SECONDS = 30


class SqliteFile:
    """The SQLite file ``path``; ``create`` makes a missing one. A context manager.

    Subclasses name what it is (``kind``), its tables (``schema``, statements with ";" between),
    ``application_id`` and the ``version`` of the schema, which SQLite keeps in the file's header.

    InputError, from here and inside `errors`: the file is missing, damaged, of another program or
    version, locked for too long, or the disk is full. What was written before stays.
    """

    kind: str
    schema: str
    application_id: int
    version: int

    def __init__(self, path: str | Path, *, create: bool = False):
        self.path = Path(path)
        if not create and not self.path.exists():
            raise InputError(f"{path}: wanted a {self.kind}, not found")
        mode = "rwc" if create else "rw"
        with self.errors():
            self.db = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=WAIT_SECONDS,
                isolation_level=None,
            )  # fmt: skip
            try:
                self._open(create)
            except BaseException:
                self.db.close()
                raise

    def _open(self, create: bool) -> None:
        if create and self._header() == (0, 0) and self._empty():
            self.db.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                if self._empty():  # no other process was faster
                    for statement in self.schema.split(";"):
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA application_id = {self.application_id}")
                    self.db.execute(f"PRAGMA user_version = {self.version}")
        application, version = self._header()
        if application != self.application_id:
            raise InputError(f"{self.path}: wanted a {self.kind}, got another SQLite file")
        if version != self.version:
            raise InputError(
                f"{self.path}: wanted a {self.kind} of version {self.version}, got version"
                f" {version} of another fastlm"
            )
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute("PRAGMA synchronous = FULL")  # a transaction outlives a power cut

    def _header(self) -> tuple[int, int]:
        (application,) = self.db.execute("PRAGMA application_id").fetchone()
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        return application, version

    def _empty(self) -> bool:
        return self.db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Context: SQLite's errors become InputErrors that name the file."""
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: cannot be used: {reason(error)}") from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Context: all or nothing of what is written, and nobody else writes meanwhile."""
        with self.errors():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # a full disk has ended it
                    self.db.execute("ROLLBACK")
                raise
