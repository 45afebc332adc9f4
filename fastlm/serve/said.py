"""What people say about answers, and answers that they let us keep; `fastlm.serve.feedback` stores
both."""

from dataclasses import dataclass
from typing import Any

from fastlm.data.conversations import Message
from fastlm.errors import InputError

KINDS = ("thumb", "comment", "corrected", "preferred_over", "metrics")


@dataclass(frozen=True)
class Opinion:
    """What somebody says about an answer (``response_id`` and ``choice``) or about a conversation.

    thumb: "up" or "down". corrected: the text that the answer should have been. preferred_over:
    answers to the same prompt that are worse, as (response_id, choice). metrics: numbers by name
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
class Kept:
    """An answer that its user let us keep. ``choices``: each the messages after the prompt."""

    response_id: str
    model: str
    prompt: list[Message]
    choices: list[list[Message]]
    tools: list[Any] | None = None
    conversation_id: str | None = None
