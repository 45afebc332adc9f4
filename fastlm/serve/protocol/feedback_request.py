"""The request of ``POST /v1/feedback``."""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from fastlm.schema import Name
from fastlm.serve.protocol.body import INTEGER, AlwaysTrue, Identifier, RequestBody, object_of
from fastlm.serve.protocol.chat_completion import Messages, Tools
from fastlm.serve.protocol.completion import MAX_CHOICES
from fastlm.serve.ratings import MAX_METRICS, NAME_PATTERN

# letters of the client's name before a rater's; two clients share them with probability 10^-14
CLIENT = 12
# the database column has 128 characters
Rater = Annotated[Name, Field(max_length=128 - CLIENT - 1)]
ChoiceIndex = Annotated[int, Field(ge=0, le=MAX_CHOICES - 1), INTEGER]
AnswerText = Annotated[str, Field(min_length=1, max_length=2**16)]


class ChoiceReference(TypedDict, total=False):
    response_id: Identifier | None
    choice: ChoiceIndex | None


class FeedbackConversation(TypedDict, total=False):
    consent: AlwaysTrue | None
    messages: Messages | None
    choices: Annotated[list[AnswerText], Field(min_length=1, max_length=MAX_CHOICES)] | None
    tools: Tools | None


Metrics = Annotated[
    # `Rating.parse` checks the values
    dict[Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")], Any],
    Field(min_length=1, max_length=MAX_METRICS),
    object_of(
        f"^{NAME_PATTERN}$",
        {"type": ["number", "boolean"]},
        minProperties=1,
        maxProperties=MAX_METRICS,
    ),
]


class FeedbackRequest(RequestBody):
    response_id: Identifier | None = None
    conversation_id: Identifier | None = None
    choice: ChoiceIndex = 0
    rater: Rater | None = None
    thumb: Literal["up", "down"] | None = None
    comment: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    corrected: AnswerText | None = None
    metrics: Metrics = {}
    preferred_over: Annotated[
        list[ChoiceReference], Field(min_length=1, max_length=MAX_CHOICES)
    ] = []
    conversation: FeedbackConversation | None = None
