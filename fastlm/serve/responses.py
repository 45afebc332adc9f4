"""Feedback about answers, and the answers that users allow to be stored.

`fastlm.serve.feedback_store` stores both.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastlm.data.conversations import Message
from fastlm.errors import InputError

KINDS = ("thumb", "comment", "corrected", "preferred_over", "ranking", "metrics")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def latest(statements: Iterable[tuple[K, T]]) -> dict[K, T]:
    """Keep the last of several statements with the same key: what one rater said of the same kind
    about the same answers. They have the order of the last ones.
    """
    last: dict[K, T] = {}
    for key, statement in statements:
        last.pop(key, None)
        last[key] = statement
    return last


@dataclass(frozen=True)
class Ranking:
    """The order in which a rater puts the choices of an answer.

    ranks: per choice, 0 is the best, equal for ties; empty: the rater skipped the answer. shown:
    the choices in the order of the rater's screen. scores: per choice, higher is better; margin: by
    how much the better of two is better (both of rows that were ranked elsewhere).
    """

    ranks: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        places = tuple(range(len(self.ranks)))
        if sorted(set(self.ranks)) != [*places[: len(set(self.ranks))]]:
            raise InputError(f"ranks: expected ranks from 0, none left out, got {self.ranks!r:.80}")
        if self.shown and tuple(sorted(self.shown)) != places:
            raise InputError(f"shown: expected each choice once, got {self.shown!r:.80}")
        if self.scores is not None and len(self.scores) != len(self.ranks):
            raise InputError(f"scores: expected one for each choice, got {self.scores!r:.80}")


@dataclass(frozen=True)
class Feedback:
    """What somebody says about an answer (``response_id`` and ``choice``) or about a conversation.

    thumb: "up" or "down". corrected: the text that the answer should have been. preferred_over:
    answers to the same prompt that are worse, as (response_id, choice). ranking: of all choices.
    metrics: numbers by name (`fastlm.serve.ratings.Rating`); 1 and 0 for yes and no.
    """

    response_id: str | None
    conversation_id: str | None = None
    choice: int = 0
    rater: str | None = None
    thumb: str | None = None
    comment: str | None = None
    corrected: str | None = None
    preferred_over: tuple[tuple[str, int], ...] = ()
    ranking: Ranking | None = None
    metrics: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.thumb not in (None, "up", "down"):
            raise InputError(f"thumb: expected up or down, got {self.thumb!r:.80}")
        for choice in (self.choice, *(choice for _, choice in self.preferred_over)):
            if choice < 0:
                raise InputError(f"choice: expected 0 or more, got {choice}")

    def kinds(self) -> list[str]:
        """The names of what it says."""
        return [name for name in KINDS if getattr(self, name)]


@dataclass(frozen=True)
class StoredResponse:
    """An answer that its user let us keep. ``choices``: each the messages after the prompt."""

    response_id: str
    model: str
    prompt: list[Message]
    choices: list[list[Message]]
    tools: list[Any] | None = None
    conversation_id: str | None = None

    def with_correction(self, choice: int, text: str) -> list[Message]:
        """Return the messages of a choice, the last one replaced by ``text``."""
        return [*self.choices[choice][:-1], {"role": "assistant", "content": text}]
