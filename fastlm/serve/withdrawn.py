"""Withdrawn consent: what was deleted from the feedback database stays known by hashes alone.

`FeedbackStore.forget` leaves a key for the response, its conversation and everything that was said
in it (`fastlm.data.forgotten`), never a text. An export takes nothing that has such a key, and
``fastlm data forget --withdrawn`` finds by them what was exported before.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fastlm.data.forgotten import asked_key, conversation_key, response_key, talk_key

TABLE = sa.Table(
    "fastlm_withdrawn",
    sa.MetaData(),
    sa.Column("key", sa.String(96), primary_key=True),
    sa.Column("asked", sa.String(96), primary_key=True),  # hash of the id that was deleted
    sa.Column("at", sa.Text, nullable=False),  # ISO 8601, UTC
)


def keys_of(
    id: str, ids: Iterable[str], answers: Iterable[Any], feedback: Iterable[Any]
) -> set[str]:
    """The keys of what is deleted with ``id``. ids: it and the responses of it as a conversation.
    answers, feedback: the rows of the two tables that go.
    """
    keys = {conversation_key(id)} | {response_key(one) for one in ids}
    prompts = {}
    for row in answers:
        prompts[row.response_id] = prompt, choices = json.loads(row.prompt), json.loads(row.choices)
        keys |= {talk_key([*prompt, *choice]) for choice in choices}
        keys |= {conversation_key(row.conversation_id)} if row.conversation_id == id else set()
    for row in feedback:
        if row.corrected and row.response_id in prompts:
            prompt, choices = prompts[row.response_id]
            if row.choice < len(choices):
                fixed = [*choices[row.choice][:-1]]
                fixed.append({"role": "assistant", "content": row.corrected})
                keys.add(talk_key([*prompt, *fixed]))
    return keys


def note(engine: sa.Engine, id: str, keys: Iterable[str]) -> None:
    """Store keys; those that are there stay."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for key in sorted(keys):
        with suppress(IntegrityError), engine.begin() as connection:
            row = {"key": key, "asked": asked_key(id), "at": now}
            connection.execute(TABLE.insert().values(row))


def stored(connection: sa.Connection, id: str | None = None) -> frozenset[str]:
    """The keys of all that was withdrawn, or of what was deleted as ``id``."""
    query = sa.select(TABLE.c.key)
    if id is not None:
        query = query.where(TABLE.c.asked == asked_key(id))
    return frozenset(connection.execute(query).scalars())


def blocks(connection: sa.Connection, response: str, conversation: str | None) -> bool:
    """Whether a response, or its conversation, may not be stored."""
    query = sa.select(TABLE.c.key).where(TABLE.c.key.in_(_keys(response, conversation)))
    return connection.execute(query.limit(1)).first() is not None


def is_withdrawn(keys: frozenset[str], response: str, conversation: str | None) -> bool:
    """Whether a response, or the conversation that it belongs to, was withdrawn."""
    return not keys.isdisjoint(_keys(response, conversation))


def _keys(response: str, conversation: str | None) -> Iterator[str]:
    yield response_key(response)
    if conversation is not None:
        yield conversation_key(conversation)
