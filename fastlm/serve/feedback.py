"""A database of what people say about answers, and, where they consent, of the answers.

SQLite (write-ahead log) or PostgreSQL. A write is on disk when the method returns. Several servers
may share the database. Personal data is removed (`fastlm.data.scrub_chat`) from every text before
it is written. Without consent only the feedback is kept: who reads it knows the id of the answer,
not its text.

`fastlm feedback build` makes rows to train on; `fastlm.serve.ranking` lets people rank answers.
"""

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.event import listen
from sqlalchemy.exc import SQLAlchemyError

from fastlm.errors import InputError
from fastlm.serve import withdrawn
from fastlm.serve.canary_tables import make_nameless
from fastlm.serve.feedback_rows import (
    answer_row,
    opinion_row,
    read_answer,
    read_opinion,
    read_rating,
    readable,
)
from fastlm.serve.ratings import Rating
from fastlm.serve.responses import KINDS, Feedback, StoredResponse
from fastlm.serve.tables import ANSWERS, FEEDBACK, MEASURES, RATINGS, create_missing, metadata

MOST_IDS = 1000  # in one statement; SQLite takes 32,766
WAIT_SECONDS = 30  # for another process that writes to the same SQLite file


class FeedbackStore:
    """The database at ``where``: an SQLAlchemy URL (``postgresql://user@host/name``), or the path
    of an SQLite file, which ``create`` makes. Missing tables are made. A context manager; any
    thread may call its methods.

    InputError, from every method: the database cannot be used.
    """

    def __init__(self, where: str | Path, *, create: bool = True):
        url = str(where)
        if "://" not in url:
            if not create and not Path(url).exists():
                raise InputError(f"{url}: expected a feedback database, not found")
            url = f"sqlite:///{Path(url).absolute()}"
        if url.startswith(("postgresql://", "postgres://")):  # the driver that the extra installs
            url = "postgresql+psycopg://" + url.partition("://")[2]
        try:
            parsed = sa.make_url(url)
            self.name = parsed.render_as_string(hide_password=True)
            self.engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=_waits(parsed))
        except (SQLAlchemyError, ImportError) as error:
            hidden = url.partition("://")[0]
            raise InputError(
                f"feedback: wanted a file or a database URL, got {hidden}://...: {_reason(error)}"
                " (for PostgreSQL: pip install 'fastlm[postgresql]')"
            ) from None
        if self.engine.dialect.name == "sqlite":
            self._refuse_another_file()
            listen(self.engine, "connect", _durable)
        self.create(metadata, withdrawn.metadata)

    def _refuse_another_file(self) -> None:
        """InputError: an SQLite file of another program, which stays as it is."""
        try:
            with self._errors():
                names = sa.inspect(self.engine).get_table_names()
        finally:
            self.engine.dispose()  # later connections are durable
        if names and ANSWERS.name not in names:
            raise InputError(f"{self.name}: expected a feedback database, got another SQLite file")

    def create(self, *groups: sa.MetaData) -> None:
        """Create tables that are missing."""
        with self._errors():
            create_missing(self.engine, *groups)

    def close(self) -> None:
        """Close the connections, after what SQLite's log has is in the file itself, unless another
        process uses it."""
        if self.engine.dialect.name == "sqlite":
            with suppress(SQLAlchemyError), self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout = 0")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise InputError(f"{self.name}: cannot be used: {_reason(error)}") from None

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Context: a connection. InputError: as of every method."""
        with self._errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Context: a connection whose transaction ends with the block."""
        with self._errors(), self.engine.begin() as connection:
            yield connection

    def insert_new(
        self, connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]
    ) -> bool:
        """Store a row, unless one with its key is there. Whether it is new."""
        dialect = sqlite if self.engine.dialect.name == "sqlite" else postgresql
        done = connection.execute(dialect.insert(table).values(row).on_conflict_do_nothing())
        return done.rowcount == 1

    def add(self, opinion: Feedback) -> int | None:
        """Store an opinion; return its number. None: what it is about was forgotten, and nothing is
        stored.
        """
        if self._blocked(opinion):
            return None
        with self.write() as connection:
            done = connection.execute(FEEDBACK.insert().values(opinion_row(opinion)))
        assert done.inserted_primary_key is not None
        number = int(done.inserted_primary_key[0])
        if not self._blocked(opinion):  # as in `keep`
            return number
        with self.write() as connection:
            connection.execute(FEEDBACK.delete().where(FEEDBACK.c.id == number))
        return None

    def keep(self, answer: StoredResponse) -> bool:
        """Store an answer and its prompt, whose user has consented; one that is stored already
        stays as it is. False: that consent was withdrawn, and nothing is stored.
        """
        if self._blocked(answer):
            return False
        with self.write() as connection:
            self.insert_new(connection, ANSWERS, answer_row(answer))
        if not self._blocked(answer):  # `forget` notes first and deletes then: one of us deletes
            return True
        with self.write() as connection:
            its = ANSWERS.c.response_id == answer.response_id
            connection.execute(ANSWERS.delete().where(its))
        return False

    def keeps(self, response_id: str | None, conversation_id: str | None) -> bool:
        """Whether the text of a response is here; without its id, of any of the conversation."""
        if response_id is None:
            its = ANSWERS.c.conversation_id == conversation_id
        else:
            its = ANSWERS.c.response_id == response_id
        with self.read() as connection:
            return (
                connection.execute(sa.select(ANSWERS.c.response_id).where(its)).first() is not None
            )

    def _blocked(self, about: StoredResponse | Feedback) -> bool:
        with self.read() as connection:
            return withdrawn.blocks(connection, about.response_id, about.conversation_id)

    def conversation_of(self, response_id: str) -> tuple[str | None] | None:
        """The conversation of a response, (None,) if it has none. None: nothing says."""
        with self.read() as connection:
            return _conversation(connection, response_id)

    def declare(self, ratings: Sequence[Rating]) -> None:
        """Store what numbers people may give. InputError: one is there with another meaning."""
        with self.write() as connection:
            for rating in ratings:
                self.insert_new(connection, RATINGS, rating.row())
        known = {rating.name: rating.row() for rating in self.ratings()}
        for rating in ratings:
            for key, value in rating.row().items():
                if known[rating.name][key] != value:
                    raise InputError(
                        f"metric {rating.name}: {key}: wanted {known[rating.name][key]!r}, which"
                        f" the numbers in {self.name} mean, got {value!r}; choose another name"
                    )

    def ratings(self) -> list[Rating]:
        """The numbers that were ever declared, by name."""
        with self.read() as connection:
            rows = connection.execute(RATINGS.select().order_by(RATINGS.c.name)).all()
        return [read_rating(row, self.name) for row in rows]

    def forget(self, id: str) -> int:
        """Delete a response or a conversation: its text, what was said about it, and its measures.
        Return how many rows there were. Hashes stay, by which exports leave it out
        (`fastlm.serve.withdrawn`), and the counts of a canary's trial, without ids.

        InputError: also that a process which reads keeps the text in SQLite's log.
        """
        gone = 0
        keys = self.keys_of(id)
        with self.write() as connection:  # first, so that a kill in between loses no key
            for row in withdrawn.rows(id, keys):
                self.insert_new(connection, withdrawn.TABLE, row)
        with self.write() as connection:
            ids = _responses(connection, id)
            for table in (ANSWERS, FEEDBACK, MEASURES):
                for its in _about(table, id, ids):
                    gone += connection.execute(table.delete().where(its)).rowcount
            gone += make_nameless(connection, ids)
        if self.engine.dialect.name == "sqlite":  # the log has the text, too, until it is emptied
            with self._errors(), self.engine.connect() as connection:
                busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            if busy:
                raise InputError(
                    f"{self.name}: wanted to empty its log, which still has what was deleted, but"
                    " another process reads: forget it again when that has ended"
                )
        return gone

    def keys_of(self, id: str) -> set[str]:
        """The keys of a response or a conversation that is still there; {} if nothing is."""
        with self.read() as connection:
            ids = _responses(connection, id)
            answers, feedback = (
                [
                    row
                    for its in _about(table, id, ids)
                    for row in connection.execute(table.select().where(its))
                ]
                for table in (ANSWERS, FEEDBACK)
            )
        if not answers and not feedback:
            return set()
        return withdrawn.keys_of(
            id, ids, readable(read_answer, answers, self.name),
            readable(read_opinion, feedback, self.name),
        )  # fmt: skip

    def withdrawn(self, id: str | None = None) -> frozenset[str]:
        """The keys of all that was ever forgotten here, or of what was forgotten as ``id``."""
        with self._errors(), self.engine.connect() as connection:
            return withdrawn.stored(connection, id)

    def answers(self) -> dict[str, StoredResponse]:
        """All answers that are kept, by id."""
        with self.read() as connection:
            rows = connection.execute(ANSWERS.select().order_by(ANSWERS.c.id)).all()
        answers = (read_answer(row, self.name) for row in rows)
        return {answer.response_id: answer for answer in answers}

    def answer(self, response_id: str) -> StoredResponse | None:
        """The answer with this id, where it is kept."""
        query = ANSWERS.select().where(ANSWERS.c.response_id == response_id)
        with self.read() as connection:
            row = connection.execute(query).first()
        return None if row is None else read_answer(row, self.name)

    def opinions(self) -> list[Feedback]:
        """All opinions, in the order in which they were given."""
        with self.read() as connection:
            rows = connection.execute(FEEDBACK.select().order_by(FEEDBACK.c.id)).all()
        return [read_opinion(row, self.name) for row in rows]

    def comments(self, most: int) -> list[dict[str, Any]]:
        """The newest comments, the last one first, with what they are about."""
        query = FEEDBACK.select().where(FEEDBACK.c.comment.is_not(None))
        with self.read() as connection:
            rows = connection.execute(query.order_by(FEEDBACK.c.id.desc()).limit(most)).all()
        keys = ("response_id", "conversation_id", "choice", "rater", "thumb", "comment")
        found = []
        for row in rows:
            opinion = read_opinion(row, self.name)
            found.append({
                "created_at": str(row.created_at), **{key: getattr(opinion, key) for key in keys}
            })  # fmt: skip
        return found

    def counts(self) -> dict[str, int]:
        """How many answers are kept, and how many opinions of each kind there are."""
        found: dict[str, int] = dict.fromkeys(("answers", *KINDS), 0)
        with self.read() as connection:
            for name in found:
                if name == "answers":
                    query = sa.select(sa.func.count()).select_from(ANSWERS)
                else:
                    query = sa.select(sa.func.count(FEEDBACK.c[name]))
                found[name] = connection.execute(query).scalar_one()
        return found


def _conversation(connection: sa.Connection, response: str) -> tuple[str | None] | None:
    """The conversation of a response, (None,) if it has none. None: nothing says."""
    for table in (ANSWERS, MEASURES):  # measures have one with consent alone
        query = sa.select(table.c.conversation_id).where(table.c.response_id == response)
        if table is MEASURES:
            query = query.where(table.c.conversation_id.is_not(None))
        if (row := connection.execute(query.limit(1)).first()) is not None:
            return (row[0],)
    return None


def _responses(connection: sa.Connection, id: str) -> set[str]:
    """``id`` and the responses of it as a conversation. An opinion may name a response with it
    whose own conversation is another: that one stays.
    """
    ids = {id}
    for table in (ANSWERS, FEEDBACK, MEASURES):
        query = sa.select(table.c.response_id).where(table.c.conversation_id == id).distinct()
        found = connection.execute(query).scalars().all()
        for response in filter(None, found):
            if table is not FEEDBACK or _conversation(connection, response) in (None, (id,)):
                ids.add(response)
    return ids


def _about(table: sa.Table, id: str, ids: set[str]) -> Iterator[sa.ColumnElement[bool]]:
    """Conditions on the rows of a table about a conversation or its responses, few enough ids in
    each for any database."""
    yield table.c.conversation_id == id
    ordered = sorted(ids)
    for first in range(0, len(ordered), MOST_IDS):
        yield table.c.response_id.in_(ordered[first : first + MOST_IDS])


def _waits(url: sa.URL) -> dict[str, Any]:
    sqlite = url.get_backend_name() == "sqlite"
    return {"timeout": WAIT_SECONDS} if sqlite else {"connect_timeout": 10}


def _durable(connection: Any, _: Any) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while True:  # where two open a new file at once, SQLite refuses one without waiting
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")  # a transaction outlives a power cut
    connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten


def _reason(error: BaseException) -> str:
    """What the database says, without PostgreSQL's details, which quote rows."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
