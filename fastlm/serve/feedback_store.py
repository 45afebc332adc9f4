"""Store feedback about answers, and with consent the answers, in a database.

The database is SQLite (write-ahead log) or PostgreSQL. A write is on disk when the method returns.
Several servers may share the database. Personal data is removed (`fastlm.data.personal`) from
every text before it is written. Without consent only the feedback is stored: it has the id of the
answer, not its text.

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
from fastlm.errors import InputError, StorageError
from fastlm.serve.feedback import KINDS, Feedback, StoredResponse
from fastlm.serve.feedback_rows import now, read_feedback, read_rating, read_response, row_of
from fastlm.serve.ratings import Rating
from fastlm.serve.tables import (
    CANARY_ANSWERS,
    CANARY_OUTCOMES,
    FEEDBACK,
    MEASUREMENTS,
    RATINGS,
    RESPONSES,
    WITHDRAWN,
    create_missing,
)

MAX_IDS = 1000  # in one statement; SQLite takes 32,766
WAIT_SECONDS = 30  # for another process that writes to the same SQLite file


class FeedbackStore:
    """The feedback database. ``location``: an SQLAlchemy URL (``postgresql://user@host/name``), or
    the path of an SQLite file. With ``create`` a missing file is created. Missing tables are
    created. The store is a context manager, and its methods are thread-safe.

    InputError, from every method: the database cannot be used.
    """

    def __init__(self, location: str | Path, *, create: bool = True):
        url = str(location)
        if "://" not in url:
            if not create and not Path(url).exists():
                raise InputError(f"{url}: expected a feedback database, not found")
            url = f"sqlite:///{Path(url).absolute()}"
        if url.startswith(("postgresql://", "postgres://")):  # the driver that the extra installs
            url = "postgresql+psycopg://" + url.partition("://")[2]
        try:
            parsed = sa.make_url(url)
            self.name = parsed.render_as_string(hide_password=True)
            self.engine = sa.create_engine(
                parsed, pool_pre_ping=True, connect_args=_timeouts(parsed)
            )
        except (SQLAlchemyError, ImportError) as error:
            hidden = url.partition("://")[0]
            raise InputError(
                f"feedback: expected a file or a database URL, got {hidden}://...: {_reason(error)}"
                " (for PostgreSQL: pip install 'fastlm[postgresql]')"
            ) from None
        if self.engine.dialect.name == "sqlite":
            self._check_tables()
            listen(self.engine, "connect", _configure_sqlite)
        with self._errors():
            create_missing(self.engine)

    def _check_tables(self) -> None:
        """Refuse the SQLite file of another program, without a change. InputError."""
        try:
            with self._errors():
                names = sa.inspect(self.engine).get_table_names()
        finally:
            self.engine.dispose()  # later connections are durable
        if names and RESPONSES.name not in names:
            raise InputError(f"{self.name}: expected a feedback database, got another SQLite file")

    def close(self) -> None:
        """Merge SQLite's log into the file, unless another process uses it, and close the
        connections."""
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
        except (SQLAlchemyError, UnicodeError) as error:  # names of tables that are not UTF-8
            raise StorageError(f"{self.name}: cannot be used: {_reason(error)}") from None

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Context: a connection."""
        with self._errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Context: a connection with a transaction that ends with the block."""
        with self._errors(), self.engine.begin() as connection:
            yield connection

    def all(self, query: Any) -> Sequence[Any]:
        """Return the rows of a query."""
        with self.read() as connection:
            return connection.execute(query).all()

    def first(self, query: Any) -> Any:
        """Return the first row of a query, None if there is none."""
        with self.read() as connection:
            return connection.execute(query.limit(1)).first()

    def insert_new(
        self, connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]
    ) -> bool:
        """Store a row, unless there is one with its key. Return whether it is new."""
        dialect = sqlite if self.engine.dialect.name == "sqlite" else postgresql
        cursor = connection.execute(dialect.insert(table).values(row).on_conflict_do_nothing())
        return cursor.rowcount == 1

    def add(self, feedback: Feedback) -> int | None:
        """Store feedback; return its number. Return None, and store nothing, if its response or
        conversation was forgotten.
        """
        if self._is_forgotten(feedback):
            return None
        with self.write() as connection:
            cursor = connection.execute(FEEDBACK.insert().values(row_of(feedback)))
        assert cursor.inserted_primary_key is not None
        number = int(cursor.inserted_primary_key[0])
        return number if self._delete_if_forgotten(feedback, FEEDBACK.c.id == number) else None

    def add_response(self, response: StoredResponse) -> bool:
        """Store a response and its prompt, with the consent of its user. A response that is stored
        already does not change. Return False, and store nothing, if consent was withdrawn.
        """
        if self._is_forgotten(response):
            return False
        with self.write() as connection:
            self.insert_new(connection, RESPONSES, row_of(response))
        return self._delete_if_forgotten(response, RESPONSES.c.response_id == response.response_id)

    def _delete_if_forgotten(
        self, value: StoredResponse | Feedback, row: sa.ColumnElement[bool]
    ) -> bool:
        """Delete a new row if it was forgotten since; return whether it stays. `forget` first
        writes the keys and then deletes, so that one of the two calls deletes."""
        if not self._is_forgotten(value):
            return True
        table = RESPONSES if isinstance(value, StoredResponse) else FEEDBACK
        with self.write() as connection:
            connection.execute(table.delete().where(row))
        return False

    def _is_forgotten(self, value: StoredResponse | Feedback) -> bool:
        """Return whether a response, or its conversation, was forgotten."""
        keys = []
        if value.response_id is not None:
            keys.append(response_key(value.response_id))
        if value.conversation_id is not None:
            keys.append(conversation_key(value.conversation_id))
        return self.first(sa.select(WITHDRAWN.c.key).where(WITHDRAWN.c.key.in_(keys))) is not None

    def has_text(self, response_id: str | None, conversation_id: str | None) -> bool:
        """Return whether the text of a response is stored; without its id, of any response of the
        conversation."""
        a = RESPONSES.c
        in_conversation = a.conversation_id == conversation_id
        condition = in_conversation if response_id is None else a.response_id == response_id
        return self.first(sa.select(a.id).where(condition)) is not None

    def stored_conversation(self, response_id: str) -> tuple[str | None] | None:
        """Return the conversation of a response, (None,) if it has none, None if it is unknown."""
        with self.read() as connection:
            return _conversation(connection, response_id)

    def declare_ratings(self, ratings: Sequence[Rating]) -> None:
        """Store the numbers that users may give. InputError: one is stored with another meaning."""
        with self.write() as connection:
            for rating in ratings:
                self.insert_new(connection, RATINGS, rating.row())
        stored = {rating.name: rating.row() for rating in self.ratings()}
        for rating in ratings:
            for key, value in rating.row().items():
                if stored[rating.name][key] != value:
                    raise InputError(
                        f"metric {rating.name}: {key}: expected {stored[rating.name][key]!r}, as"
                        f" declared in {self.name}, got {value!r}; choose another name"
                    )

    def ratings(self) -> list[Rating]:
        """Return the numbers that were ever declared, by name."""
        rows = self.all(RATINGS.select().order_by(RATINGS.c.name))
        return [read_rating(row, self.name) for row in rows]

    def responses(self) -> dict[str, StoredResponse]:
        """Return all stored responses, by id."""
        rows = self.all(RESPONSES.select().order_by(RESPONSES.c.id))
        return {row.response_id: read_response(row, self.name) for row in rows}

    def response(self, response_id: str) -> StoredResponse | None:
        """Return the stored response with this id, or None."""
        row = self.first(RESPONSES.select().where(RESPONSES.c.response_id == response_id))
        return None if row is None else read_response(row, self.name)

    def all_feedback(self) -> list[Feedback]:
        """Return all feedback, in the order in which it was given."""
        rows = self.all(FEEDBACK.select().order_by(FEEDBACK.c.id))
        return [read_feedback(row, self.name) for row in rows]

    def comments(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest comments, the last one first, with the ids that they are about."""
        query = FEEDBACK.select().where(FEEDBACK.c.comment.is_not(None))
        keys = ("response_id", "conversation_id", "choice", "rater", "thumb", "comment")
        comments = []
        for row in self.all(query.order_by(FEEDBACK.c.id.desc()).limit(limit)):
            feedback = read_feedback(row, self.name)
            fields = {key: getattr(feedback, key) for key in keys}
            comments.append({"created_at": str(row.created_at), **fields})
        return comments

    def counts(self) -> dict[str, int]:
        """Return the number of stored responses, and of feedback of each kind."""
        responses = self.first(sa.select(sa.func.count(RESPONSES.c.id).label("responses")))
        kinds = self.first(sa.select(*(sa.func.count(FEEDBACK.c[k]).label(k) for k in KINDS)))
        return {**responses._mapping, **kinds._mapping}

    # ---- withdrawn consent: only hashes of deleted rows stay

    def forget(self, id: str) -> int:
        """Delete a response or a conversation: its text, its feedback and its measurements. Return
        the number of deleted rows.

        Its keys stay (`fastlm.data.forget_log`): `fastlm feedback build` leaves it out, and
        ``fastlm data forget --withdrawn`` finds rows that were built before. The counts of a canary
        experiment stay, too, without ids.

        InputError: also that another process reads, so that SQLite's log still has the text.
        """
        rows = [
            {"key": key, "request_key": request_key(id), "withdrawn_at": now()}
            for key in self.keys_of(id)
        ]
        with self.write() as connection:  # first, so that a kill in between loses no key
            for row in rows:
                self.insert_new(connection, WITHDRAWN, row)
        with self.write() as connection:
            ids = _response_ids(connection, id)
            deleted = _anonymise_canary(connection, ids)
            for table in (RESPONSES, FEEDBACK, MEASUREMENTS):
                for condition in _conditions(table, id, ids):
                    deleted += connection.execute(table.delete().where(condition)).rowcount
        if self.engine.dialect.name == "sqlite":  # the log has the text until it is truncated
            with self.read() as connection:
                busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            if busy:
                raise InputError(
                    f"{self.name}: expected to truncate its log, which still has the deleted text,"
                    " but another process reads: run the command again when that has ended"
                )
        return deleted

    def keys_of(self, id: str) -> set[str]:
        """Return the keys of a response or a conversation that is stored: of its ids, its answers
        and their corrections; an empty set if nothing is stored."""
        responses: dict[str, StoredResponse] = {}
        feedback_rows: list[Feedback] = []
        has_rows = False
        with self.read() as connection:
            ids = _response_ids(connection, id)
            for table in (RESPONSES, FEEDBACK):
                for condition in _conditions(table, id, ids):
                    for row in connection.execute(table.select().where(condition)):
                        has_rows = True
                        with suppress(InputError):  # a damaged row is deleted all the same
                            if table is RESPONSES:
                                responses[row.response_id] = read_response(row, self.name)
                            else:
                                feedback_rows.append(read_feedback(row, self.name))
        if not has_rows:
            return set()
        keys = {conversation_key(id), *map(response_key, ids)}
        for response in responses.values():
            keys |= {messages_key([*response.prompt, *choice]) for choice in response.choices}
        for feedback in feedback_rows:
            response = responses.get(feedback.response_id or "")
            if not feedback.corrected or response is None:
                continue
            if feedback.choice < len(response.choices):
                messages = response.with_correction(feedback.choice, feedback.corrected)
                keys.add(messages_key([*response.prompt, *messages]))
        return keys

    def withdrawn_keys(self, id: str | None = None) -> frozenset[str]:
        """Return the keys of everything that was ever forgotten here, or only of ``id``."""
        query = sa.select(WITHDRAWN.c.key)
        if id is not None:
            query = query.where(WITHDRAWN.c.request_key == request_key(id))
        return frozenset(row.key for row in self.all(query))


def _conversation(connection: sa.Connection, response: str) -> tuple[str | None] | None:
    """Return the conversation of a response, (None,) if it has none, None if it is unknown."""
    for table in (RESPONSES, MEASUREMENTS):  # measurements have one only with consent
        query = sa.select(table.c.conversation_id).where(table.c.response_id == response)
        if table is MEASUREMENTS:
            query = query.where(table.c.conversation_id.is_not(None))
        if (row := connection.execute(query.limit(1)).first()) is not None:
            return (row[0],)
    return None


def _response_ids(connection: sa.Connection, id: str) -> set[str]:
    """Return ``id`` and the ids of the responses in the conversation ``id``. If feedback names the
    conversation and a response of another one, that response is left out.
    """
    ids = {id}
    for table in (RESPONSES, FEEDBACK, MEASUREMENTS):
        query = sa.select(table.c.response_id).where(table.c.conversation_id == id).distinct()
        responses = connection.execute(query).scalars().all()
        for response in filter(None, responses):
            if table is not FEEDBACK or _conversation(connection, response) in (None, (id,)):
                ids.add(response)
    return ids


def _conditions(table: sa.Table, id: str, ids: set[str]) -> Iterator[sa.ColumnElement[bool]]:
    """Yield conditions on the rows of a table about a conversation or its responses, each with at
    most `MAX_IDS` ids."""
    yield table.c.conversation_id == id
    ordered = sorted(ids)
    for first in range(0, len(ordered), MAX_IDS):
        yield table.c.response_id.in_(ordered[first : first + MAX_IDS])


def _anonymise_canary(connection: sa.Connection, ids: Iterable[str]) -> int:
    """Replace the ids of responses and conversations in the rows of canaries by random ones. Return
    the number of answers.
    """
    a, o, count = CANARY_ANSWERS, CANARY_OUTCOMES, 0
    for id in ids:
        condition = sa.or_(a.c.response_id.in_((id, f"refused-{id}")), a.c.conversation_id == id)
        for row in connection.execute(a.select().where(condition)).all():
            unit = secrets.token_hex(32)
            for table in (a, o):
                same = sa.and_(table.c.experiment == row.experiment, table.c.unit == row.unit)
                connection.execute(table.update().where(same).values(unit=unit))
            random_id = f"forgotten-{secrets.token_hex(16)}"
            for table, values in (
                (a, {"response_id": random_id, "conversation_id": None}),
                (o, {"response_id": None}),
            ):
                same = table.c.response_id == row.response_id
                connection.execute(table.update().where(same).values(values))
            count += 1
    return count


def _timeouts(url: sa.URL) -> dict[str, Any]:
    sqlite = url.get_backend_name() == "sqlite"
    return {"timeout": WAIT_SECONDS} if sqlite else {"connect_timeout": 10}


def _configure_sqlite(connection: Any, _: Any) -> None:
    """Set the write-ahead log, durable transactions and secure deletion."""
    until = time.monotonic() + WAIT_SECONDS
    while True:  # if two processes open a new file at once, SQLite refuses one without waiting
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")  # a transaction outlives a power cut
    connection.execute("PRAGMA secure_delete = ON")  # deleted text is overwritten


def _reason(error: BaseException) -> str:
    """Return the message of the database, without PostgreSQL's details, which quote rows."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
