"""Answers in OpenAI's shapes, from the pieces of an engine: whole, or as server-sent events."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anyio.to_thread import run_sync
from pydantic_core import to_json

from fastlm.inference.requests import Piece, TokenLogprob
from fastlm.serve.api_error import ApiError, server_error, stopping
from fastlm.serve.generic_tools import GenericText
from fastlm.serve.tools import CallsOrText, ToolText

if TYPE_CHECKING:
    from fastlm.inference.forms import Form
    from fastlm.serve.protocol.completion import GenerationRequest
    from fastlm.serve.response_stream import ResponseStream
    from fastlm.tokenizer.tokenizer import Tokenizer

Event = dict[str, Any]
Scored = TokenLogprob | int  # a token alone: the first of a prompt, which follows nothing


@dataclass(frozen=True)
class Echo:
    """The text of a prompt, and its first token where that has no log-probability."""

    text: str
    first: int | None


@dataclass
class Choice:
    """One answer as far as it is known. ``text``: all of it; of a chat without its tool calls."""

    reader: ToolText | GenericText | None
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Scored] = field(default_factory=list)
    tokens: int = 0
    offset: int = 0  # characters of the tokens whose log-probabilities were written

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [] if self.reader is None else self.reader.calls


@dataclass
class Answer:
    """The answer to a request, in the shapes of /v1/chat/completions: `whole`, or `events`; either
    one, once.

    ``request``, ``id`` and ``model``, the one that answers, as the client sees them; ``form``: the
    one that the engine keeps to; ``prompt_tokens``: of all prompts; ``echoes``: the texts before
    each prompt's answers.
    """

    request: Any  # a GenerationRequest
    id: str
    model: str
    running: "ResponseStream"
    tokenizer: "Tokenizer"
    form: "Form | None"
    prompt_tokens: int
    echoes: Sequence[Echo] = ()

    prefix: ClassVar[str] = "chatcmpl-"  # of ids
    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    ends: ClassVar[bytes] = b"data: [DONE]\n\n"  # behind the last event

    def __post_init__(self) -> None:
        self.created, self.cached_tokens = int(time.time()), 0
        self.num_logprobs = self.request.num_logprobs
        self.choices = [Choice(_reader(self.request, self.form)) for _ in range(self.running.count)]

    async def whole(self) -> bytes:
        """The body of a response that is not streamed, as JSON."""
        async for index, piece in self.running:
            self._take(index, piece)
        # many log-probabilities take seconds
        return self._body() if self.num_logprobs is None else await run_sync(self._body)

    def _body(self) -> bytes:
        choices = []
        for index, choice in enumerate(self.choices):
            logprobs = None
            if self.num_logprobs is not None:
                logprobs = self._logprobs(choice.logprobs, choice)
            ended = {"finish_reason": choice.finish_reason, "logprobs": logprobs}
            choices.append({"index": index, **self._content(index), **ended})
        return to_json({**self._head(self.object), "usage": self.usage(), "choices": choices})

    async def events(self) -> AsyncIterator[Event]:
        """The events of a streamed response, without the last "[DONE]"."""
        for index in range(len(self.choices)):
            if begin := self._begin(index):
                yield self._chunk(index, begin)
        async for index, piece in self.running:
            text, scored = self._take(index, piece)
            choice = self.choices[index]
            logprobs = self._logprobs(scored, choice) if scored else None
            if text or logprobs:
                yield self._chunk(index, {"content": text}, logprobs)
            if choice.finish_reason is not None:
                if choice.calls:
                    calls = [{"index": i, **call} for i, call in enumerate(choice.calls)]
                    yield self._chunk(index, {"tool_calls": calls})
                yield self._chunk(index, {}, None, choice.finish_reason)
        if self.request.include_usage:
            yield {**self._head(self.chunk_object), "usage": self.usage(), "choices": []}

    def encode(self, event: Event) -> bytes:
        """An event as the client gets it."""
        return b"data: " + to_json(event) + b"\n\n"

    def failed(self, error: ApiError) -> bytes:
        """The event of an answer that could not be ended."""
        return self.encode(error.body())

    def messages(self) -> list[list[dict[str, Any]]]:
        """Each choice as messages, as data for training has them, without nulls."""
        return [[self._message(choice)] for choice in self.choices]

    def _message(self, choice: Choice) -> Event:
        message: Event = {"role": "assistant", "content": choice.text}
        return message | ({"tool_calls": choice.calls} if choice.calls else {})

    def usage(self) -> dict[str, Any]:
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _take(self, index: int, piece: Piece) -> tuple[str, list[Any]]:
        """Add a piece to its choice; return the text that the client gets now, and tokens with
        their log-probabilities."""
        choice, ended = self.choices[index], piece.finish_reason
        choice.tokens += len(piece.tokens)
        late = ended == "deadline" and not any(c.tokens for c in self.choices)
        if late or ended in ("error", "refused", "cancelled"):
            self.running.close()
            raise ended_badly(piece)
        text = piece.text if choice.reader is None else choice.reader.push(piece.text)
        if self.num_logprobs is not None and not self.request.stream:
            choice.logprobs += piece.logprobs
        if ended is not None:
            if choice.reader is not None:
                text += choice.reader.end()
            # OpenAI has no name for the end of the time that a request may take
            choice.finish_reason = "length"
            if ended == "stop":
                choice.finish_reason = "tool_calls" if choice.calls else "stop"
            if index % self.request.n == 0:  # the others share the prompt of the first choice
                self.cached_tokens += piece.cached_tokens
        choice.text += text
        return text, piece.logprobs

    def _head(self, object: str) -> Event:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: Event, logprobs: Event | None = None, reason: str | None = None
    ) -> Event:
        choice = {"index": index, **self._shaped(delta)}
        choice |= {"logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head(self.chunk_object), "choices": [choice]}
        if self.request.include_usage:
            chunk["usage"] = self.usage() if self.request.continuous_usage else None
        return chunk

    def _content(self, index: int) -> Event:
        """The field of a choice that has its message or text."""
        message = self._message(self.choices[index])
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        return {"message": message}

    def _begin(self, index: int) -> Event | None:
        """What a stream says of a choice before its first piece."""
        return {"role": "assistant", "content": ""}

    def _shaped(self, delta: Event) -> Event:
        return {"delta": delta}

    def _logprobs(self, scored: Sequence[Any], choice: Choice) -> Event:
        """Log-probabilities of tokens that follow those of the choice written before."""
        return {"content": list(self._scored_tokens(scored)), "refusal": None}

    def _scored_tokens(self, scored: Sequence[Any]) -> Iterator[Event]:
        for one in scored:
            top = [self._token(*pair) for pair in one.top]
            yield {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, id: int, logprob: float) -> Event:
        data = self._bytes(id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _bytes(self, id: int) -> bytes:
        """Nothing for an id of a padded model that the tokenizer does not have."""
        return self.tokenizer.token_bytes(id) if id < self.tokenizer.vocab_size else b""


class TextAnswer(Answer):
    """To /v1/completions, whose ``echoes`` are before the answers where the request asks for it."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _echo(self, index: int) -> Echo:
        return self.echoes[index // self.request.n] if self.echoes else Echo("", None)

    def _content(self, index: int) -> Event:
        return {"text": self._echo(index).text + self.choices[index].text}

    def _begin(self, index: int) -> Event | None:
        text = self._echo(index).text
        # else with its log-probabilities
        return {"content": text} if text and self.num_logprobs is None else None

    def _shaped(self, delta: Event) -> Event:
        return {"text": delta.get("content", "")}

    def _take(self, index: int, piece: Piece) -> tuple[str, list[Any]]:
        echo, scored = "", list[Any]()
        first = bool(piece.tokens) and not self.choices[index].tokens
        if first and self.echoes and self.num_logprobs is not None:
            before = self._echo(index)
            echo = before.text if self.request.stream else ""
            scored = [] if before.first is None else [before.first]
            scored += piece.prompt_logprobs
        if self.request.max_tokens == 0 and piece.finish_reason in ("stop", "length"):
            # the token that was drawn is nobody's
            piece = replace(piece, tokens=[], text="", logprobs=[], finish_reason="length")
        if scored:
            piece = replace(piece, logprobs=[*scored, *piece.logprobs])
        text, scored = super()._take(index, piece)
        return echo + text, scored

    def _logprobs(self, scored: Sequence[Any], choice: Choice) -> Event:
        told: Event = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in scored:
            token, logprob, top = (
                (one, None, None) if isinstance(one, int) else (one.token, one.logprob, one.top)
            )
            named = None if top is None else {self._name(id): value for id, value in top}
            told["tokens"].append(self._name(token))
            told["token_logprobs"].append(logprob)
            told["top_logprobs"].append(named)
            told["text_offset"].append(choice.offset)
            choice.offset += len(self._bytes(token).decode(errors="replace"))
        return told

    def _name(self, id: int) -> str:
        """A token as a key: its text, or ``bytes:\\xNN`` where that is a part of a character."""
        data = self._bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _reader(request: "GenerationRequest", form: "Form | None") -> ToolText | GenericText | None:
    """What reads calls in the answer."""
    kind = None if form is None else form.kind
    tools = form.value.tools if form and kind == "generic" else getattr(request, "tools", None)
    if tools is None:
        return None
    names = [tool["function"]["name"] for tool in tools]
    if kind in ("generic", "calls_or"):
        return GenericText(names) if kind == "generic" else CallsOrText(names)
    # where a form keeps calls to their schemas, what it does not know as a call is text
    return ToolText(names, whole=kind != "calls")


def ended_badly(piece: Piece) -> ApiError:
    """The error of an answer that the engine ended."""
    if piece.finish_reason == "cancelled":
        return stopping()
    if piece.finish_reason == "refused":
        return ApiError(str(piece.error), code="grammar")
    if piece.finish_reason == "deadline":
        late = "queue: the time that a request may take was over before its answer began"
        return server_error(late, 503, code="too_late")
    return server_error(f"the answer failed: {piece.error}")
