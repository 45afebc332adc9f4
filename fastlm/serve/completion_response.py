"""Responses of /v1/chat/completions and /v1/completions, built from the engine's pieces: one JSON
body, or server-sent events."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anyio.to_thread import run_sync
from pydantic_core import to_json

from fastlm.inference.requests import Piece, TokenLogprob
from fastlm.inference.tool_parser import CallsOrTextParser, ToolParser
from fastlm.serve.api_error import ApiError, server_error, stopping
from fastlm.serve.generic_tools import GenericToolParser

if TYPE_CHECKING:
    from fastlm.inference.output_format import OutputFormat
    from fastlm.serve.protocol.completion import GenerationRequest
    from fastlm.serve.response_stream import ResponseStream
    from fastlm.tokenizer.tokenizer import Tokenizer

Event = dict[str, Any]
# an int: the first token of a prompt, which has no log-probability
LogprobEntry = TokenLogprob | int


@dataclass(frozen=True)
class PromptEcho:
    """The text of a prompt, and its first token if that has no log-probability."""

    text: str
    first_token: int | None


@dataclass
class Choice:
    """One choice of a response so far. ``text`` excludes tool calls."""

    tool_parser: ToolParser | GenericToolParser | None
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[LogprobEntry] = field(default_factory=list)
    tokens: int = 0
    text_offset: int = 0  # characters of the tokens with a log-probability that was returned

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return [] if self.tool_parser is None else self.tool_parser.tool_calls


@dataclass
class ChatCompletionResponse:
    """The response to a request, in the format of /v1/chat/completions. Call `body` or `events`,
    and only once.

    ``id`` and ``model`` are what the client sees; ``model`` is the one that answers.
    ``output_format``: the constraint on the text. ``prompt_tokens``: the sum over all prompts.
    ``echoes``: the texts that precede the answers, one for each prompt.
    """

    request: Any  # a GenerationRequest
    id: str
    model: str
    stream: "ResponseStream"
    tokenizer: "Tokenizer"
    output_format: "OutputFormat | None"
    prompt_tokens: int
    echoes: Sequence[PromptEcho] = ()

    id_prefix: ClassVar[str] = "chatcmpl-"
    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    end_marker: ClassVar[bytes] = b"data: [DONE]\n\n"  # follows the last event

    def __post_init__(self) -> None:
        self.created, self.cached_tokens = int(time.time()), 0
        self.num_logprobs = self.request.num_logprobs
        self.choices = [
            Choice(_tool_parser(self.request, self.output_format)) for _ in range(self.stream.count)
        ]

    async def body(self) -> bytes:
        """Wait for all pieces; return the JSON body of a response that is not streamed."""
        async for index, piece in self.stream:
            self._add_piece(index, piece)
        # encoding many log-probabilities takes seconds
        return (
            self._encode_body() if self.num_logprobs is None else await run_sync(self._encode_body)
        )

    def _encode_body(self) -> bytes:
        choices = []
        for index, choice in enumerate(self.choices):
            logprobs = None
            if self.num_logprobs is not None:
                logprobs = self._logprobs(choice.logprobs, choice)
            end = {"finish_reason": choice.finish_reason, "logprobs": logprobs}
            choices.append({"index": index, **self._content(index), **end})
        return to_json({**self._header(self.object), "usage": self.usage(), "choices": choices})

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of a streamed response, without the last "[DONE]"."""
        for index in range(len(self.choices)):
            if delta := self._first_delta(index):
                yield self._chunk(index, delta)
        async for index, piece in self.stream:
            text, entries = self._add_piece(index, piece)
            choice = self.choices[index]
            logprobs = self._logprobs(entries, choice) if entries else None
            if text or logprobs:
                yield self._chunk(index, {"content": text}, logprobs)
            if choice.finish_reason is not None:
                if choice.tool_calls:
                    calls = [{"index": i, **call} for i, call in enumerate(choice.tool_calls)]
                    yield self._chunk(index, {"tool_calls": calls})
                yield self._chunk(index, {}, None, choice.finish_reason)
        if self.request.include_usage:
            yield {**self._header(self.chunk_object), "usage": self.usage(), "choices": []}

    def encode(self, event: Event) -> bytes:
        """Encode an event as server-sent bytes."""
        return b"data: " + to_json(event) + b"\n\n"

    def error_event(self, error: ApiError) -> bytes:
        """Return the event that ends a stream with an error."""
        return self.encode(error.body())

    def messages(self) -> list[list[dict[str, Any]]]:
        """Return each choice as messages in the format of training data, without nulls."""
        return [[self._message(choice)] for choice in self.choices]

    def _message(self, choice: Choice) -> Event:
        message: Event = {"role": "assistant", "content": choice.text}
        return message | ({"tool_calls": choice.tool_calls} if choice.tool_calls else {})

    def usage(self) -> dict[str, Any]:
        completion_tokens = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _add_piece(self, index: int, piece: Piece) -> tuple[str, list[Any]]:
        """Add a piece to its choice; return the text to send now, and the tokens with their
        log-probabilities."""
        choice, reason = self.choices[index], piece.finish_reason
        choice.tokens += len(piece.tokens)
        is_late = reason == "deadline" and not any(c.tokens for c in self.choices)
        if is_late or reason in ("error", "refused", "cancelled"):
            self.stream.close()
            raise generation_error(piece)
        parser = choice.tool_parser
        text = piece.text if parser is None else parser.push(piece.text)
        if self.num_logprobs is not None and not self.request.stream:
            choice.logprobs += piece.logprobs
        if reason is not None:
            if parser is not None:
                text += parser.end()
            # OpenAI's API has no finish reason for a timeout
            choice.finish_reason = "length"
            if reason == "stop":
                choice.finish_reason = "tool_calls" if choice.tool_calls else "stop"
            if index % self.request.n == 0:  # the others share the prompt of the first choice
                self.cached_tokens += piece.cached_tokens
        choice.text += text
        return text, piece.logprobs

    def _header(self, object: str) -> Event:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: Event, logprobs: Event | None = None, reason: str | None = None
    ) -> Event:
        choice = {"index": index, **self._format_delta(delta)}
        choice |= {"logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._header(self.chunk_object), "choices": [choice]}
        if self.request.include_usage:
            chunk["usage"] = self.usage() if self.request.continuous_usage else None
        return chunk

    def _content(self, index: int) -> Event:
        """Return the field of a choice that has its message or text."""
        message = self._message(self.choices[index])
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        return {"message": message}

    def _first_delta(self, index: int) -> Event | None:
        """Return the delta that a stream sends before a choice's first piece."""
        return {"role": "assistant", "content": ""}

    def _format_delta(self, delta: Event) -> Event:
        return {"delta": delta}

    def _logprobs(self, entries: Sequence[Any], choice: Choice) -> Event:
        """Format the log-probabilities of a choice's next tokens."""
        return {"content": list(self._token_logprobs(entries)), "refusal": None}

    def _token_logprobs(self, entries: Sequence[Any]) -> Iterator[Event]:
        for entry in entries:
            top = [self._token(*pair) for pair in entry.top]
            yield {**self._token(entry.token, entry.logprob), "top_logprobs": top}

    def _token(self, id: int, logprob: float) -> Event:
        data = self._bytes(id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _bytes(self, id: int) -> bytes:
        """Return a token's bytes; none for an id of a padded model that the tokenizer lacks."""
        return self.tokenizer.token_bytes(id) if id < self.tokenizer.vocab_size else b""


class CompletionResponse(ChatCompletionResponse):
    """The response of /v1/completions; with ``echo``, each answer begins with its prompt."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _echo(self, index: int) -> PromptEcho:
        return self.echoes[index // self.request.n] if self.echoes else PromptEcho("", None)

    def _content(self, index: int) -> Event:
        return {"text": self._echo(index).text + self.choices[index].text}

    def _first_delta(self, index: int) -> Event | None:
        text = self._echo(index).text
        # with log-probabilities, the first piece has the echo
        return {"content": text} if text and self.num_logprobs is None else None

    def _format_delta(self, delta: Event) -> Event:
        return {"text": delta.get("content", "")}

    def _add_piece(self, index: int, piece: Piece) -> tuple[str, list[Any]]:
        echo_text, entries = "", list[Any]()
        is_first = bool(piece.tokens) and not self.choices[index].tokens
        if is_first and self.echoes and self.num_logprobs is not None:
            echo = self._echo(index)
            echo_text = echo.text if self.request.stream else ""
            entries = [] if echo.first_token is None else [echo.first_token]
            entries += piece.prompt_logprobs
        if self.request.max_tokens == 0 and piece.finish_reason in ("stop", "length"):
            # drop the one token that the engine drew
            piece = replace(piece, tokens=[], text="", logprobs=[], finish_reason="length")
        if entries:
            piece = replace(piece, logprobs=[*entries, *piece.logprobs])
        text, entries = super()._add_piece(index, piece)
        return echo_text + text, entries

    def _logprobs(self, entries: Sequence[Any], choice: Choice) -> Event:
        columns: Event = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token, logprob, top = (
                (entry, None, None)
                if isinstance(entry, int)
                else (entry.token, entry.logprob, entry.top)
            )
            top_by_key = None if top is None else {self._key(id): value for id, value in top}
            columns["tokens"].append(self._key(token))
            columns["token_logprobs"].append(logprob)
            columns["top_logprobs"].append(top_by_key)
            columns["text_offset"].append(choice.text_offset)
            choice.text_offset += len(self._bytes(token).decode(errors="replace"))
        return columns

    def _key(self, id: int) -> str:
        """Return a token's text, or ``bytes:\\xNN`` where it is a part of a character."""
        data = self._bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _tool_parser(
    request: "GenerationRequest", output_format: "OutputFormat | None"
) -> ToolParser | GenericToolParser | None:
    """Return the parser of tool calls in an answer; None: the request has no tools."""
    kind = None if output_format is None else output_format.kind
    tools = (
        output_format.value.tools
        if output_format and kind == "generic"
        else getattr(request, "tools", None)
    )
    if tools is None:
        return None
    names = [tool["function"]["name"] for tool in tools]
    if kind in ("generic", "calls_or"):
        return GenericToolParser(names) if kind == "generic" else CallsOrTextParser(names)
    # where the format constrains calls to their schemas, all else is text
    return ToolParser(names, json_answer=kind != "calls")


def generation_error(piece: Piece) -> ApiError:
    """Return the error of an answer that the engine ended without a result."""
    if piece.finish_reason == "cancelled":
        return stopping()
    if piece.finish_reason == "refused":
        return ApiError(str(piece.error), code="grammar")
    if piece.finish_reason == "deadline":
        message = "queue: the time limit of a request ended before its answer began"
        return server_error(message, 503, code="too_late")
    return server_error(f"the answer failed: {piece.error}")
