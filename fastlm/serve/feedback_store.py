"""A database of what people say about answers, and, where they consent, of the answers.

SQLite (write-ahead log) or PostgreSQL. A write is on disk when the method returns. Several servers
may share the database. Personal data is removed (`fastlm.data.scrub_chat`) from every text before
it is written. Without consent only the feedback is kept: who reads it knows the id of the answer,
not its text.

`fastlm feedback build` makes rows to train on; `fastlm.serve.ranking` lets people rank answers.
"""

import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.event import listen
from sqlalchemy.exc import SQLAlchemyError

from fastlm.data.forget_log import conversation_key, messages_key, request_key, response_key
from fastlm.errors import InputError
from fastlm.serve.feedback import KINDS, Feedback, StoredResponse
from fastlm.serve.feedback_rows import now, read_feedback, read_rating, read_response, row_of
from fastlm.serve.ratings import Rating
from fastlm.serve.tables import (
    ANSWERS,
    CANARY_ANSWERS,
    CANARY_OUTCOMES,
    FEEDBACK,
    MEASURES,
    RATINGS,
    WITHDRAWN,
    create_missing,
)

MAX_IDS = 1000  # in one statement; SQLite takes 32,766
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
                f"feedback: expected a file or a database URL, got {hidden}://...: {_reason(error)}"
                " (for PostgreSQL: pip install 'fastlm[postgresql]')"
            ) from None
        if self.engine.dialect.name == "sqlite":
            self._refuse_another_file()
            listen(self.engine, "connect", _durable)
        with self._errors():
            create_missing(self.engine)

    def _refuse_another_file(self) -> None:
        """InputError: an SQLite file of another program, which stays as it is."""
        try:
            with self._errors():
                names = sa.inspect(self.engine).get_table_names()
        finally:
            self.engine.dispose()  # later connections are durable
        if names and ANSWERS.name not in names:
            raise InputError(f"{self.name}: expected a feedback database, got another SQLite file")

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

    def all(self, query: Any) -> Sequence[Any]:
        """The rows of a query."""
        with self.read() as connection:
            return connection.execute(query).all()

    def first(self, query: Any) -> Any:
        """The first row of a query, None if there is none."""
        with self.read() as connection:
            return connection.execute(query.limit(1)).first()

    def insert_new(
        self, connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]
    ) -> bool:
        """Store a row, unless one with its key is there. Whether it is new."""
        dialect = sqlite if self.engine.dialect.name == "sqlite" else postgresql
        done = connection.execute(dialect.insert(table).values(row).on_conflict_do_nothing())
        return done.rowcount == 1

    def add(self, feedback: Feedback) -> int | None:
        """Store feedback; return its number. None: what it is about was forgotten, and nothing is
        stored.
        """
        if self._blocked(feedback):
            return None
        with self.write() as connection:
            done = connection.execute(FEEDBACK.insert().values(row_of(feedback)))
        assert done.inserted_primary_key is not None
        number = int(done.inserted_primary_key[0])
        return number if self._stays(feedback, FEEDBACK.c.id == number) else None

    def keep(self, answer: StoredResponse) -> bool:
        """Store an answer and its prompt, whose user has consented; one that is stored already
        stays as it is. False: that consent was withdrawn, and nothing is stored.
        """
        if self._blocked(answer):
            return False
        with self.write() as connection:
            self.insert_new(connection, ANSWERS, row_of(answer))
        return self._stays(answer, ANSWERS.c.response_id == answer.response_id)

    def _stays(self, about: StoredResponse | Feedback, row: sa.ColumnElement[bool]) -> bool:
        """Delete what was just stored if it was forgotten meanwhile: `forget` notes first and
        deletes then, so one of us deletes."""
        if not self._blocked(about):
            return True
        table = ANSWERS if isinstance(about, StoredResponse) else FEEDBACK
        with self.write() as connection:
            connection.execute(table.delete().where(row))
        return False

    def _blocked(self, about: StoredResponse | Feedback) -> bool:
        """Whether a response, or the conversation that it belongs to, was withdrawn."""
        keys = []
        if about.response_id is not None:
            keys.append(response_key(about.response_id))
        if about.conversation_id is not None:
            keys.append(conversation_key(about.conversation_id))
        return self.first(sa.select(WITHDRAWN.c.key).where(WITHDRAWN.c.key.in_(keys))) is not None

    def keeps(self, response_id: str | None, conversation_id: str | None) -> bool:
        """Whether the text of a response is here; without its id, of any of the conversation."""
        a = ANSWERS.c
        by_talk = a.conversation_id == conversation_id
        its = by_talk if response_id is None else a.response_id == response_id
        return self.first(sa.select(a.id).where(its)) is not None

    def parse_conversation(self, response_id: str) -> tuple[str | None] | None:
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
                        f"metric {rating.name}: {key}: expected {known[rating.name][key]!r}, which"
                        f" the numbers in {self.name} mean, got {value!r}; choose another name"
                    )

    def ratings(self) -> list[Rating]:
        """The numbers that were ever declared, by name."""
        rows = self.all(RATINGS.select().order_by(RATINGS.c.name))
        return [read_rating(row, self.name) for row in rows]

    def answers(self) -> dict[str, StoredResponse]:
        """All answers that are kept, by id."""
        rows = self.all(ANSWERS.select().order_by(ANSWERS.c.id))
        return {row.response_id: read_response(row, self.name) for row in rows}

    def answer(self, response_id: str) -> StoredResponse | None:
        """The answer with this id, where it is kept."""
        row = self.first(ANSWERS.select().where(ANSWERS.c.response_id == response_id))
        return None if row is None else read_response(row, self.name)

    def all_feedback(self) -> list[Feedback]:
        """Return all feedback, in the order in which it was given."""
        rows = self.all(FEEDBACK.select().order_by(FEEDBACK.c.id))
        return [read_feedback(row, self.name) for row in rows]

    def comments(self, most: int) -> list[dict[str, Any]]:
        """The newest comments, the last one first, with what they are about."""
        query = FEEDBACK.select().where(FEEDBACK.c.comment.is_not(None))
        keys = ("response_id", "conversation_id", "choice", "rater", "thumb", "comment")
        found = []
        for row in self.all(query.order_by(FEEDBACK.c.id.desc()).limit(most)):
            feedback = read_feedback(row, self.name)
            about = {key: getattr(feedback, key) for key in keys}
            found.append({"created_at": str(row.created_at), **about})
        return found

    def counts(self) -> dict[str, int]:
        """How many answers are kept, and how much feedback of each kind there is."""
        answers = self.first(sa.select(sa.func.count(ANSWERS.c.id).label("answers")))
        kinds = self.first(sa.select(*(sa.func.count(FEEDBACK.c[k]).label(k) for k in KINDS)))
        return {**answers._mapping, **kinds._mapping}

    # ---- withdrawn consent: what was deleted stays known by hashes alone

    def forget(self, id: str) -> int:
        """Delete a response or a conversation: its text, what was said about it, and its measures.
        Return how many rows there were. Keys stay (`fastlm.data.forget_log`), by which `fastlm
        feedback build` leaves it out and ``fastlm data forget --withdrawn`` finds what was built
        before; and the counts of a canary's trial, without ids.

        InputError: also that a process which reads keeps the text in SQLite's log.
        """
        rows = [
            {"key": key, "request_key": request_key(id), "withdrawn_at": now()}
            for key in self.keys_of(id)
        ]
        with self.write() as connection:  # first, so that a kill in between loses no key
            for row in rows:
                self.insert_new(connection, WITHDRAWN, row)
        with self.write() as connection:
            ids = _responses(connection, id)
            gone = _make_nameless(connection, ids)
            for table in (ANSWERS, FEEDBACK, MEASURES):
                for its in _about(table, id, ids):
                    gone += connection.execute(table.delete().where(its)).rowcount
        if self.engine.dialect.name == "sqlite":  # the log has the text, too, until it is emptied
            with self.read() as connection:
                busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            if busy:
                raise InputError(
                    f"{self.name}: expected to empty its log, which still has what was deleted, but"
                    " another process reads: forget it again when that has ended"
                )
        return gone

    def keys_of(self, id: str) -> set[str]:
        """The keys of a response or a conversation that is still there: of its ids, its answers
        and their corrections; {} if nothing is."""
        answers: dict[str, StoredResponse] = {}
        feedback_rows: list[Feedback] = []
        found = False
        with self.read() as connection:
            ids = _responses(connection, id)
            for table in (ANSWERS, FEEDBACK):
                for its in _about(table, id, ids):
                    for row in connection.execute(table.select().where(its)):
                        found = True
                        with suppress(InputError):  # a damaged row is deleted all the same
                            if table is ANSWERS:
                                answers[row.response_id] = read_response(row, self.name)
                            else:
                                feedback_rows.append(read_feedback(row, self.name))
        if not found:
            return set()
        keys = {conversation_key(id), *map(response_key, ids)}
        for answer in answers.values():
            keys |= {messages_key([*answer.prompt, *choice]) for choice in answer.choices}
        for feedback in feedback_rows:
            answer = answers.get(feedback.response_id or "")
            if feedback.corrected and answer is not None and feedback.choice < len(answer.choices):
                fixed = answer.with_correction(feedback.choice, feedback.corrected)
                keys.add(messages_key([*answer.prompt, *fixed]))
        return keys

    def withdrawn_keys(self, id: str | None = None) -> frozenset[str]:
        """Return the keys of everything that was ever forgotten here, or of ``id`` alone."""
        query = sa.select(WITHDRAWN.c.key)
        if id is not None:
            query = query.where(WITHDRAWN.c.request_key == request_key(id))
        return frozenset(row.key for row in self.all(query))


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
    """``id`` and the responses of it as a conversation. Feedback may name the conversation and a
    response of another one: that response stays.
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
    for first in range(0, len(ordered), MAX_IDS):
        yield table.c.response_id.in_(ordered[first : first + MAX_IDS])


def _make_nameless(connection: sa.Connection, ids: Iterable[str]) -> int:
    """Give ids that say nothing to what a canary counted of responses and conversations. Return
    how many answers there were.
    """
    a, o, count = CANARY_ANSWERS, CANARY_OUTCOMES, 0
    for id in ids:
        its = sa.or_(a.c.response_id.in_((id, f"refused-{id}")), a.c.conversation_id == id)
        for row in connection.execute(a.select().where(its)).all():
            unit = secrets.token_hex(32)
            for table in (a, o):
                same = sa.and_(table.c.experiment == row.experiment, table.c.unit == row.unit)
                connection.execute(table.update().where(same).values(unit=unit))
            nameless = f"forgotten-{secrets.token_hex(16)}"
            for table, values in (
                (a, {"response_id": nameless, "conversation_id": None}),
                (o, {"response_id": None}),
            ):
                same = table.c.response_id == row.response_id
                connection.execute(table.update().where(same).values(values))
            count += 1
    return count


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
