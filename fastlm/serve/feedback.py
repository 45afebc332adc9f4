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
    """Keep the last of several statements with the same key (one rater's feedback of one kind about
    the same answers), in the order of these last statements.
    """
    last: dict[K, T] = {}
    for key, statement in statements:
        last.pop(key, None)
        last[key] = statement
    return last


@dataclass(frozen=True)
class Ranking:
    """A rater's ranking of the choices of a response.

    ranks: one per choice; 0 is the best, ties are equal; empty: the rater skipped the response.
    display_order: the choices in the order of the rater's screen. scores: one per choice, higher is
    better. margin: by how much the better of two choices is better. Only imported rankings have
    scores and margin.
    """

    ranks: tuple[int, ...] = ()
    display_order: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        choices = tuple(range(len(self.ranks)))
        if sorted(set(self.ranks)) != [*choices[: len(set(self.ranks))]]:
            raise InputError(f"ranks: expected ranks from 0, none left out, got {self.ranks!r:.80}")
        if self.display_order and tuple(sorted(self.display_order)) != choices:
            raise InputError(
                f"display_order: expected each choice once, got {self.display_order!r:.80}"
            )
        if self.scores is not None and len(self.scores) != len(self.ranks):
            raise InputError(f"scores: expected one for each choice, got {self.scores!r:.80}")


@dataclass(frozen=True)
class Feedback:
    """Feedback about an answer (``response_id`` and ``choice``) or a conversation.

    thumb: "up" or "down". corrected: a better text of the answer. preferred_over: worse answers to
    the same prompt, as (response_id, choice). ranking: of all choices. metrics: numbers by name
    (`fastlm.serve.ratings.Rating`); 1 and 0 for yes and no.
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
        """Return the names of the fields that are set."""
        return [name for name in KINDS if getattr(self, name)]


@dataclass(frozen=True)
class StoredResponse:
    """A response that its user allows to be stored. ``choices``: the messages of each, without the
    prompt."""

    response_id: str
    model: str
    prompt: list[Message]
    choices: list[list[Message]]
    tools: list[Any] | None = None
    conversation_id: str | None = None

    def with_correction(self, choice: int, text: str) -> list[Message]:
        """Return the messages of a choice, the last one replaced by ``text``."""
        return [*self.choices[choice][:-1], {"role": "assistant", "content": text}]
