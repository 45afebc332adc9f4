"""``POST /v1/feedback``: opinions about answers, at any time after them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fastlm.errors import InputError
from fastlm.serve.fields import (
    ApiError,
    Field,
    choice,
    identifier,
    list_of,
    name,
    read_fields,
    table,
    text,
    whole,
    wrong,
)
from fastlm.serve.openai_api import CHAT, MOST_CHOICES
from fastlm.serve.ratings import MOST, NAME, Rating, read_values
from fastlm.serve.said import Kept, Opinion

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.feedback import FeedbackStore

CLIENT = 12  # letters of a client's name before a rater's: 1 in 10^14 that two clients share them
MOST_TEXT = 2**16  # characters of a corrected answer
CHOICE = whole(0, MOST_CHOICES - 1, 0)
OTHER = table({"response_id": identifier(), "choice": CHOICE})
KEPT = {
    "consent": choice(True),
    "messages": CHAT["messages"],
    "choices": list_of(text(MOST_TEXT), 1, MOST_CHOICES),
    "tools": CHAT["tools"],
}
METRICS = {
    "type": "object",
    "propertyNames": {"pattern": f"^{NAME}$"},
    "additionalProperties": {"type": ["number", "boolean"]},
    "minProperties": 1,
    "maxProperties": MOST,
}


def _metrics(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MOST:
        raise wrong(name, f"an object of 1 to {MOST} numbers by name", value)
    return value


FEEDBACK: Mapping[str, Field] = {
    "response_id": identifier(),
    "conversation_id": identifier(),
    "choice": CHOICE,
    "rater": name(128 - CLIENT - 1),  # the column has 128 characters
    "thumb": choice("up", "down"),
    "comment": text(4096),
    "corrected": text(MOST_TEXT),
    "metrics": Field(_metrics, METRICS, {}),
    "preferred_over": list_of(
        table({"response_id": identifier(), "choice": CHOICE}), 1, MOST_CHOICES
    ),
    "conversation": table(KEPT),
}


def read_feedback(
    body: Any, model: str, ratings: Sequence[Rating] = ()
) -> tuple[Opinion, Kept | None]:
    """What a body says: an opinion, and the conversation if its user lets us keep it. ``ratings``:
    the numbers that it may give.
    """
    given = read_fields(body, FEEDBACK)
    response: Any = given["response_id"]
    talk: Any = given.pop("conversation")
    if response is None and given["conversation_id"] is None:
        raise ApiError(
            "response_id: wanted this or conversation_id, got neither", param="response_id"
        )
    worse: list[tuple[Any, int]] = []
    for i, other in enumerate(given["preferred_over"]):
        key = (other["response_id"] or response, other["choice"])
        if key == (response, given["choice"]) or key[0] is None:
            raise ApiError(
                f"preferred_over[{i}]: wanted another answer, got the one that is preferred",
                param=f"preferred_over[{i}]",
            )
        worse.append(key)
    try:
        values = read_values(
            given["metrics"], ratings, response=response is not None,
            conversation=given["conversation_id"] is not None,
        )  # fmt: skip
    except InputError as error:
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None
    said: dict[str, Any] = {**given, "preferred_over": tuple(worse), "metrics": values}
    opinion = Opinion(**said)
    if not opinion.kinds() and talk is None:
        raise ApiError(
            "thumb: wanted this, metrics, comment, corrected, preferred_over or conversation, got"
            " none",
            param="thumb",
        )
    if response is None and (opinion.corrected or opinion.preferred_over or talk):
        raise ApiError("response_id: wanted the id of an answer, got none", param="response_id")
    if talk is None or response is None:
        return opinion, None
    if not talk["consent"] or talk["messages"] is None or not talk["choices"]:
        raise ApiError(
            "conversation.consent: wanted true, with messages and choices: without consent no text"
            " is kept",
            param="conversation.consent",
        )
    answers = [[{"role": "assistant", "content": answer}] for answer in talk["choices"]]
    kept = Kept(response, model, talk["messages"], answers, talk["tools"], given["conversation_id"])
    return opinion, kept


async def give(server: "Server", http: Request) -> Response:
    """Store feedback. The response is sent when it is on disk."""
    store = server.feedback
    if store is None:
        raise ApiError(
            "feedback: this server has no database for it (fastlm serve --feedback)",
            status=404, code="no_feedback",
        )  # fmt: skip
    read = partial(read_feedback, model=server.models.name, ratings=server.ratings)
    opinion, kept = await server.body(http, read)
    if len(server.keys) > 1:  # nobody speaks as a rater of another key
        opinion = replace(opinion, rater=rater_of(http.state.client, opinion.rater))
    manager = server.manager

    def write() -> tuple[int | None, bool | None]:
        _check_conversation(store, opinion)
        if kept is not None:
            told = None if manager is None else manager.model_of(kept.response_id)
            store.keep(kept if told is None else replace(kept, model=told))
        # counted, then stored: said again after a failure, it is stored, and a trial counts it once
        if manager is not None:
            manager.feedback(opinion)
        number = store.add(opinion) if opinion.kinds() else None
        try:
            return number, store.keeps(opinion.response_id, opinion.conversation_id)
        except InputError:  # the opinion is stored all the same
            return number, None

    try:
        number, keeps = await run_sync(write, limiter=server.writing)
    except ApiError:
        raise
    except InputError:
        raise ApiError(
            "feedback: the database cannot be used; try again", status=503, kind="server_error",
            code="no_database", headers={"retry-after": "5"},
        ) from None  # fmt: skip
    for kind in opinion.kinds() if number is not None else ():
        server.metrics.feedback.labels(kind).inc()
    return JSONResponse({"object": "feedback", "id": number, "kept": keeps})


def rater_of(client: str, name: str | None) -> str:
    """The name under which a rater is stored where there are several keys: letters of the key's
    hash, and the name that was given. ``client``: that hash in hexadecimal digits.
    """
    letters = "".join(chr(ord("a") + int(digit, 16)) for digit in client[:CLIENT])
    return f"{letters}:{name or ''}"


def _check_conversation(store: "FeedbackStore", opinion: Opinion) -> None:
    """ApiError: the answer is known, and of another conversation than the opinion says: whoever
    forgets that conversation would delete what was said in this one."""
    response, given = opinion.response_id, opinion.conversation_id
    if response is None or given is None:
        return
    own = store.conversation_of(response)
    if own is not None and own != (given,):
        raise ApiError(
            "conversation_id: expected that of the answer, or none, got another",
            param="conversation_id",
        )
