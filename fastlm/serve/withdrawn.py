"""Withdrawn consent: what was deleted from the feedback database stays known by hashes alone.

`FeedbackStore.forget` leaves a key for the response, its conversation and everything that was said
in it (`fastlm.data.forgotten`), never a text. `fastlm feedback build` takes nothing that has such
a key, and ``fastlm data forget --withdrawn`` finds by them what was built before.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import sqlalchemy as sa

from fastlm.data.forgotten import asked_key, conversation_key, response_key, talk_key
from fastlm.serve.responses import Feedback, StoredResponse

metadata = sa.MetaData()
TABLE = sa.Table(
    "fastlm_withdrawn",
    metadata,
    sa.Column("key", sa.String(96), primary_key=True),
    sa.Column("asked", sa.String(96), primary_key=True),  # hash of the id that was deleted
    sa.Column("at", sa.Text, nullable=False),  # ISO 8601, UTC
)


def keys_of(
    id: str, ids: Iterable[str], answers: Iterable[StoredResponse], opinions: Iterable[Feedback]
) -> set[str]:
    """The keys of what is deleted with ``id``: the response or conversation ``id``, the responses
    ``ids``, and what the answers and the corrections of them say.
    """
    keys = {conversation_key(id)} | {response_key(one) for one in ids}
    stored = {answer.response_id: answer for answer in answers}
    for answer in stored.values():
        keys |= {talk_key([*answer.prompt, *choice]) for choice in answer.choices}
    for opinion in opinions:
        answer = stored.get(opinion.response_id or "")
        if opinion.corrected and answer is not None and opinion.choice < len(answer.choices):
            fixed = answer.corrected(opinion.choice, opinion.corrected)
            keys.add(talk_key([*answer.prompt, *fixed]))
    return keys


def rows(id: str, keys: Iterable[str]) -> list[dict[str, str]]:
    """The rows of keys that are deleted with ``id``."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [{"key": key, "asked": asked_key(id), "at": now} for key in sorted(keys)]


def stored(connection: sa.Connection, id: str | None = None) -> frozenset[str]:
    """The keys of all that was withdrawn, or of what was deleted as ``id``."""
    query = sa.select(TABLE.c.key)
    if id is not None:
        query = query.where(TABLE.c.asked == asked_key(id))
    return frozenset(connection.execute(query).scalars())


def blocks(connection: sa.Connection, response: str | None, conversation: str | None) -> bool:
    """Whether nothing about a response, or its conversation, may be stored."""
    query = sa.select(TABLE.c.key).where(TABLE.c.key.in_(_keys(response, conversation)))
    return connection.execute(query.limit(1)).first() is not None


def is_withdrawn(keys: frozenset[str], response: str, conversation: str | None) -> bool:
    """Whether a response, or the conversation that it belongs to, was withdrawn."""
    return not keys.isdisjoint(_keys(response, conversation))


def _keys(response: str | None, conversation: str | None) -> Iterator[str]:
    if response is not None:
        yield response_key(response)
    if conversation is not None:
        yield conversation_key(conversation)
