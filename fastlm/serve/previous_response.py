"""The conversation that a request to /v1/responses continues: ``previous_response_id``."""

from typing import TYPE_CHECKING

from fastlm.data.conversations import messages_of
from fastlm.errors import InputError
from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.responses_api import ChatOfResponses

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore


def with_previous(request: ChatOfResponses, store: "FeedbackStore | None") -> ChatOfResponses:
    """Return the request with the conversation before it. New instructions replace the old
    ones.

    ApiError: the server has not kept it.
    """
    param = "previous_response_id"
    previous, instructions = request.repeated[param], request.repeated["instructions"]
    if store is None:
        raise ApiError(
            f"{param}: this server keeps no conversations (fastlm serve --feedback): send the whole"
            " conversation as input",
            param=param,
        )
    try:
        kept = store.answer(previous)
    except InputError:
        raise ApiError(
            f"{param}: the database of conversations cannot be read now", status=503, param=param,
            kind="server_error",
        ) from None  # fmt: skip
    if kept is None or not kept.choices:  # a stranger's database has what it likes
        raise ApiError(
            f"{param}: expected a response that was stored (store: true), got {previous!r}: send"
            " the whole conversation as input",
            param=param, code="previous_response_not_found",
        )  # fmt: skip
    before = [*kept.prompt, *kept.choices[0]]
    start = int(bool(instructions))
    if start and before and before[0]["role"] == "system":
        before = before[1:]
    before = [message for _, message in messages_of(before, param)]
    # what is stored of a continuation belongs to what it continues: to forget one forgets both
    conversation = request.conversation_id
    if request.store and conversation is None:
        conversation = kept.conversation_id or previous
    messages = [*request.messages[:start], *before, *request.messages[start:]]
    return request.model_copy(update={"messages": messages, "conversation_id": conversation})
