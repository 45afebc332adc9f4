"""Serve ``POST /v1/feedback``: store feedback about answers, at any time after them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fastlm.errors import InputError
from fastlm.serve.api_error import ApiError
from fastlm.serve.feedback import Feedback, StoredResponse
from fastlm.serve.protocol.feedback_request import FeedbackRequest
from fastlm.serve.rater_api import rater_of, unavailable
from fastlm.serve.ratings import Rating, read_values

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.feedback_store import FeedbackStore


def parse_feedback(
    request: FeedbackRequest, model: str, ratings: Sequence[Rating] = ()
) -> tuple[Feedback, StoredResponse | None]:
    """Return the feedback of a request, and the response if its user consents to store the text.
    ``ratings``: the declared numbers.
    """
    response, conversation = request.response_id, request.conversation
    if response is None and request.conversation_id is None:
        raise ApiError(
            "response_id: expected this or conversation_id, got neither", param="response_id"
        )
    worse: list[tuple[Any, int]] = []
    for i, other in enumerate(request.preferred_over):
        key = (other.get("response_id") or response, other.get("choice") or 0)
        if key == (response, request.choice) or key[0] is None:
            raise ApiError(
                f"preferred_over[{i}]: expected another answer, got the one that is preferred",
                param=f"preferred_over[{i}]",
            )
        worse.append(key)
    try:
        values = read_values(
            request.metrics, ratings, response=response is not None,
            conversation=request.conversation_id is not None,
        )  # fmt: skip
    except InputError as error:
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None
    names = ("response_id", "conversation_id", "choice", "rater", "thumb", "comment", "corrected")
    fields: dict[str, Any] = {name: getattr(request, name) for name in names}
    feedback = Feedback(**fields, preferred_over=tuple(worse), metrics=values)
    if not feedback.kinds() and conversation is None:
        raise ApiError(
            "thumb: expected this, metrics, comment, corrected, preferred_over or conversation, got"
            " none",
            param="thumb",
        )
    if response is None and (feedback.corrected or feedback.preferred_over or conversation):
        raise ApiError("response_id: expected the id of an answer, got none", param="response_id")
    if conversation is None or response is None:
        return feedback, None
    messages, choices = conversation.get("messages"), conversation.get("choices")
    if not conversation.get("consent") or messages is None or not choices:
        raise ApiError(
            "conversation.consent: expected true, with messages and choices: without consent no"
            " text is stored",
            param="conversation.consent",
        )
    answers = [[{"role": "assistant", "content": answer}] for answer in choices]
    tools = conversation.get("tools") or None
    return feedback, StoredResponse(
        response, model, messages, answers, tools, request.conversation_id
    )


async def post_feedback(server: "Server", http: Request) -> Response:
    """Store feedback. The response is sent after the write is on disk."""
    store = server.feedback
    if store is None:
        raise ApiError(
            "feedback: this server has no database for it (fastlm serve --feedback)",
            status=404, code="no_feedback",
        )  # fmt: skip
    request = await server.parse_body(http, FeedbackRequest)
    feedback, response = parse_feedback(request, server.models.name, server.ratings)
    if len(server.keys) > 1:  # so that nobody can give feedback as a rater of another key
        feedback = replace(feedback, rater=rater_of(http.state.client, feedback.rater))
    manager = server.manager

    def write() -> tuple[int | None, bool | None]:
        _check_conversation(store, feedback)
        if response is not None:
            model = None if manager is None else manager.model_name(response.response_id)
            store.add_response(response if model is None else replace(response, model=model))
        # counted, then stored: if it is sent again after a failure, an experiment counts it once
        if manager is not None:
            manager.record_feedback(feedback)
        number = store.add(feedback) if feedback.kinds() else None
        try:
            return number, store.has_text(feedback.response_id, feedback.conversation_id)
        except InputError:  # the feedback is stored in any case
            return number, None

    try:
        number, text_stored = await run_sync(write, limiter=server.database_limiter)
    except ApiError:
        raise
    except InputError:
        raise unavailable("feedback: the database") from None
    for kind in feedback.kinds() if number is not None else ():
        server.metrics.feedback.labels(kind).inc()
    return JSONResponse({"object": "feedback", "id": number, "text_stored": text_stored})


def _check_conversation(store: "FeedbackStore", feedback: Feedback) -> None:
    """Refuse feedback that names another conversation than the answer's. Otherwise, forgetting that
    conversation would delete feedback of this one. ApiError."""
    response, conversation = feedback.response_id, feedback.conversation_id
    if response is None or conversation is None:
        return
    stored = store.stored_conversation(response)
    if stored is not None and stored != (conversation,):
        raise ApiError(
            "conversation_id: expected that of the answer, or none, got another",
            param="conversation_id",
        )
