"""Answers in OpenAI's shapes, from the pieces of an engine: whole, or as server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync

from fastlm.inference.requests import Piece, TokenLogprob
from fastlm.serve.api_error import ApiError
from fastlm.serve.generic_tools import GenericText
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.tools import CallsOrText, ToolText

if TYPE_CHECKING:
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

    text: str = ""
    finish_reason: str | None = None
    tools: ToolText | CallsOrText | GenericText | None = None
    logprobs: list[Scored] = field(default_factory=list)
    began: bool = False
    tokens: int = 0
    offset: int = 0  # characters of the tokens whose log-probabilities were told


class Answer:
    """The answer to a request: `whole`, or `events`; either one, once.

    ``request``, ``id`` and ``model``, the one that answers, as the client sees them; ``prompts``:
    the texts that /v1/completions puts before the answers where it is asked to;
    ``prompt_tokens``: of all prompts.
    """

    def __init__(
        self,
        request: GenerationRequest,
        id: str,
        running: "ResponseStream",
        tokenizer: "Tokenizer",
        prompts: list[Echo],
        prompt_tokens: int,
        model: str,
    ):
        self.request, self.id, self.running, self.tokenizer = request, id, running, tokenizer
        self.model = model
        self.chat = isinstance(request, ChatCompletionRequest)
        self.num_logprobs = request.num_logprobs
        self.created = int(time.time())
        self.choices = [Choice(tools=_reader(request)) for _ in range(running.count)]
        self.echo = prompts if isinstance(request, CompletionRequest) and request.echo else []
        self.prompt_tokens, self.cached_tokens = prompt_tokens, 0

    async def whole(self) -> bytes:
        """The body of a response that is not streamed, as JSON."""
        async for index, piece in self.running:
            self._take(index, piece)
        return await run_sync(self._body)

    def _body(self) -> bytes:
        """Takes a while where there are many log-probabilities: they become text one by one, since
        `json.dumps` lets no other thread run."""
        told = self._head("chat.completion" if self.chat else "text_completion")
        told["usage"] = self.usage()
        choices = ",".join(self._whole_choice(i, choice) for i, choice in enumerate(self.choices))
        return f'{to_json(told)[:-1]},"choices":[{choices}]}}'.encode()

    async def events(self) -> AsyncIterator[Event]:
        """The events of a streamed response, without the last "[DONE]"."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")

        def event(*choices: Event) -> Event:
            usage: dict[str, Any] = {}
            if self.request.include_usage:
                usage["usage"] = self.usage() if self.request.continuous_usage else None
            return {**head, **usage, "choices": list(choices)}

        if self.chat:
            for i in range(len(self.choices)):
                yield event(self._chunk(i, {"role": "assistant", "content": ""}))
        else:
            for i, echo in enumerate(self._echoes()):
                if echo.text and self.num_logprobs is None:  # else with its log-probabilities
                    yield event(self._chunk(i, echo.text))
        async for index, piece in self.running:
            text, scored = self._take(index, piece)
            choice, logprobs = self.choices[index], None
            if scored:
                logprobs = self._logprobs(scored, choice)
            if text or logprobs:
                delta = {"content": text} if self.chat else text
                yield event(self._chunk(index, delta, logprobs))
            if choice.finish_reason is not None:
                calls = choice.tools.calls if choice.tools is not None else []
                if calls:
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    yield event(self._chunk(index, {"tool_calls": numbered}))
                yield event(self._chunk(index, {} if self.chat else "", None, choice.finish_reason))
        if self.request.include_usage:
            yield {**event(), "usage": self.usage()}

    ends = b"data: [DONE]\n\n"  # behind the last event

    def encode(self, event: Event) -> bytes:
        """An event as the client gets it."""
        return sse(event)

    def failed(self, error: ApiError) -> bytes:
        """The event of an answer that could not be ended."""
        return sse(error.body())

    def messages(self) -> list[list[dict[str, Any]]]:
        """Each choice as messages, to be kept."""
        return [[self._message(choice, kept=True)] for choice in self.choices]

    def usage(self) -> dict[str, Any]:
        prompt, new = self.prompt_tokens, sum(c.tokens for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _take(self, index: int, piece: Piece) -> tuple[str, list[Scored]]:
        """Add a piece to its choice; return the text that the client gets now, and tokens with
        their log-probabilities."""
        choice, before, scored = self.choices[index], "", list[Scored]()
        if piece.tokens and not choice.began:
            choice.began = True
            if self.echo and self.num_logprobs is not None:
                echo = self._echoes()[index]
                before = echo.text if self.request.stream else ""
                scored = [] if echo.first is None else [echo.first]
                scored += piece.prompt_logprobs
        if self.request.max_tokens == 0 and piece.finish_reason in ("stop", "length"):
            # the token that was drawn is nobody's
            piece = replace(piece, tokens=[], text="", logprobs=[], finish_reason="length")
        scored += piece.logprobs
        choice.tokens += len(piece.tokens)
        late = piece.finish_reason == "deadline" and not any(c.tokens for c in self.choices)
        if late or piece.finish_reason in ("error", "refused", "cancelled"):
            self.running.abandon()
            raise ended_badly(piece)
        text = piece.text
        if choice.tools is not None:
            text = choice.tools.push(text)
        if self.num_logprobs is not None and not self.request.stream:
            choice.logprobs += scored
        if piece.finish_reason is not None:
            if choice.tools is not None:
                text += choice.tools.end()
            calls = choice.tools is not None and choice.tools.calls
            # OpenAI has no name for the end of the time that a request may take
            ended = "stop" if piece.finish_reason == "stop" else "length"
            choice.finish_reason = "tool_calls" if calls and ended == "stop" else ended
            if index % self.request.n == 0:  # the others share the prompt of the first choice
                self.cached_tokens += piece.cached_tokens
        choice.text += text
        return before + text, scored

    def _head(self, kind: str) -> Event:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _echoes(self) -> list[Echo]:
        return [echo for echo in self.echo for _ in range(self.request.n)]

    def _whole_choice(self, index: int, choice: Choice) -> str:
        echoes = self._echoes()
        told: Event = {"index": index}
        if self.chat:
            told["message"] = self._message(choice)
        else:
            told["text"] = (echoes[index].text if echoes else "") + choice.text
        told["finish_reason"] = choice.finish_reason
        return f'{to_json(told)[:-1]},"logprobs":{self._logprobs_json(choice)}}}'

    def _logprobs_json(self, choice: Choice) -> str:
        if self.num_logprobs is None:
            return "null"
        if self.chat:
            content = ",".join(map(to_json, self._chat_logprobs(choice.logprobs)))
            return f'{{"content":[{content}],"refusal":null}}'
        told = self._logprobs(choice.logprobs, choice)
        lists = (f'"{key}":[{",".join(map(to_json, values))}]' for key, values in told.items())
        return "{" + ",".join(lists) + "}"

    def _message(self, choice: Choice, kept: bool = False) -> Event:
        """The assistant's message; ``kept``: as data for training has it, without nulls."""
        calls = choice.tools.calls if choice.tools is not None else []
        message: Event = {"role": "assistant", "content": choice.text or (None if calls else "")}
        if kept:
            message["content"] = choice.text
        if calls:
            message["tool_calls"] = calls
        return message

    def _chunk(
        self, index: int, delta: Any, logprobs: Event | None = None, reason: str | None = None
    ) -> Event:
        said = {"delta": delta} if self.chat else {"text": delta}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, found: list[Scored], choice: Choice) -> Event:
        """``found`` follow what was told of the choice before."""
        if self.chat:
            return {"content": list(self._chat_logprobs(found)), "refusal": None}
        told: Event = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in found:
            token, logprob, top = (
                (one, None, None) if isinstance(one, int) else (one.token, one.logprob, one.top)
            )
            named = None if top is None else {self._name(id): value for id, value in top}
            told["tokens"].append(self._name(token))
            told["token_logprobs"].append(logprob)
            told["top_logprobs"].append(named)
            told["text_offset"].append(choice.offset)
            choice.offset += len(self._text(token))
        return told

    def _chat_logprobs(self, found: list[Scored]) -> Iterator[Event]:
        for one in found:
            if not isinstance(one, int):
                top = [self._token(*pair) for pair in one.top]
                yield {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, id: int, logprob: float) -> Event:
        return {"token": self._text(id), "logprob": logprob, "bytes": list(self._bytes(id))}

    def _name(self, id: int) -> str:
        """A token as a key: its text, or ``bytes:\\xNN`` where that is a part of a character."""
        data = self._bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _text(self, id: int) -> str:
        return self._bytes(id).decode(errors="replace")

    def _bytes(self, id: int) -> bytes:
        """Nothing for an id of a padded model that the tokenizer does not have."""
        return self.tokenizer.token_bytes(id) if id < self.tokenizer.vocab_size else b""


def _reader(request: GenerationRequest) -> ToolText | CallsOrText | GenericText | None:
    """What reads calls in the answer."""
    form = request.form
    if form is not None and form.kind == "generic":
        return GenericText([tool["function"]["name"] for tool in form.value.tools])
    if not isinstance(request, ChatCompletionRequest) or request.tools is None:
        return None
    names = [tool["function"]["name"] for tool in request.tools]
    if form is not None and form.kind == "calls_or":
        return CallsOrText(names)
    # where a form keeps calls to their schemas, what it does not know as a call is text
    return ToolText(names, whole=form is None or form.kind != "calls")


def ended_badly(piece: Piece) -> ApiError:
    """The error of an answer that the engine ended."""
    if piece.finish_reason == "cancelled":
        return stopping()
    if piece.finish_reason == "refused":
        return ApiError(str(piece.error), code="grammar")
    if piece.finish_reason == "deadline":
        return ApiError(
            "queue: the time that a request may take was over before its answer began",
            status=503, kind="server_error", code="too_late", headers={"retry-after": "5"},
        )  # fmt: skip
    return ApiError(f"the answer failed: {piece.error}", status=500, kind="server_error")


def stopping() -> ApiError:
    return ApiError(
        "the server is stopping", status=503, kind="server_error", code="stopping",
        headers={"retry-after": "5"},
    )  # fmt: skip


def sse(event: Event) -> bytes:
    """A server-sent event."""
    return f"data: {to_json(event)}\n\n".encode()


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
