"""Answers in OpenAI's shapes, from the pieces of an engine: whole, or as server-sent events."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastlm.serve.fields import ApiError
from fastlm.serve.openai_api import Asked, ChatAsked, TextAsked
from fastlm.serve.requests import Piece, TokenLogprob
from fastlm.serve.tools import ToolText

if TYPE_CHECKING:
    from fastlm.serve.running import Running
    from fastlm.tokenizer.tokenizer import Tokenizer

Event = dict[str, Any]


@dataclass
class Choice:
    """One answer as far as it is known. ``text``: all of it; of a chat without its tool calls."""

    text: str = ""
    finish_reason: str | None = None
    tools: ToolText | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0


class Answer:
    """The answer to a request: `whole`, or `events`; either one, once.

    ``asked``, ``id`` and ``model`` as the client sees them; ``prompts``: the texts that
    /v1/completions puts before the answers where it is asked to.
    """

    def __init__(
        self, asked: Asked, id: str, running: "Running", tokenizer: "Tokenizer", prompts: list[str]
    ):
        self.asked, self.id, self.running, self.tokenizer = asked, id, running, tokenizer
        self.chat = isinstance(asked, ChatAsked)
        self.created = int(time.time())
        names: list[str] = []
        if isinstance(asked, ChatAsked) and asked.tools is not None:
            names = [tool["function"]["name"] for tool in asked.tools]
        self.choices = [
            Choice(tools=ToolText(names) if names else None) for _ in range(running.count)
        ]
        self.echo = prompts if isinstance(asked, TextAsked) and asked.echo else []
        self.prompt_tokens: dict[int, int] = {}  # by prompt: its first choice tells
        self.cached_tokens = 0

    async def whole(self) -> Event:
        """The body of a response that is not streamed."""
        async for index, piece in self.running:
            self._take(index, piece)
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._whole_choice(i, choice) for i, choice in enumerate(self.choices)],
            "usage": self.usage(),
        }

    async def events(self) -> AsyncIterator[Event]:
        """The events of a streamed response, without the last "[DONE]"."""
        more = {"usage": None} if self.asked.include_usage else {}
        head = self._head("chat.completion.chunk" if self.chat else "text_completion") | more
        if self.chat:
            for i in range(len(self.choices)):
                yield {**head, "choices": [self._chunk(i, {"role": "assistant", "content": ""})]}
        else:
            for i, text in enumerate(self._echoes()):
                if text:
                    yield {**head, "choices": [self._chunk(i, text)]}
        async for index, piece in self.running:
            text, logprobs = self._take(index, piece), None
            choice = self.choices[index]
            if piece.logprobs:
                logprobs = self._logprobs(piece.logprobs, 0)
            if text or logprobs:
                delta = {"content": text} if self.chat else text
                yield {**head, "choices": [self._chunk(index, delta, logprobs)]}
            if choice.finish_reason is not None:
                calls = choice.tools.calls if choice.tools is not None else []
                if calls:
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    yield {**head, "choices": [self._chunk(index, {"tool_calls": numbered})]}
                last = self._chunk(index, {} if self.chat else "", None, choice.finish_reason)
                yield {**head, "choices": [last]}
        if self.asked.include_usage:
            yield {**head, "choices": [], "usage": self.usage()}

    def messages(self) -> list[list[dict[str, Any]]]:
        """Each choice as messages, to be kept."""
        return [[self._message(choice, kept=True)] for choice in self.choices]

    def usage(self) -> dict[str, Any]:
        prompt, new = sum(self.prompt_tokens.values()), sum(c.tokens for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _take(self, index: int, piece: Piece) -> str:
        """Add a piece to its choice; return the text that the client gets now."""
        if piece.finish_reason in ("error", "cancelled"):
            raise ended_badly(piece)
        choice = self.choices[index]
        choice.tokens += len(piece.tokens)
        text = piece.text
        if choice.tools is not None:
            text = choice.tools.push(text)
        if self.asked.logprobs is not None and not self.asked.stream:
            choice.logprobs += piece.logprobs
        if piece.finish_reason is not None:
            if choice.tools is not None:
                text += choice.tools.end()
            calls = choice.tools is not None and choice.tools.calls
            # OpenAI has no name for the end of the time that a request may take
            ended = "stop" if piece.finish_reason == "stop" else "length"
            choice.finish_reason = "tool_calls" if calls and ended == "stop" else ended
            prompt = index // self.asked.n
            if prompt not in self.prompt_tokens:
                self.prompt_tokens[prompt] = piece.prompt_tokens
                self.cached_tokens += piece.cached_tokens
        choice.text += text
        return text

    def _head(self, kind: str) -> Event:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def _echoes(self) -> list[str]:
        return [text for text in self.echo for _ in range(self.asked.n)]

    def _whole_choice(self, index: int, choice: Choice) -> Event:
        echoes = self._echoes()
        told: Event = {"index": index}
        if self.chat:
            told["message"] = self._message(choice)
        else:
            told["text"] = (echoes[index] if echoes else "") + choice.text
        has = self.asked.logprobs is not None
        told["logprobs"] = self._logprobs(choice.logprobs, 0) if has else None
        return {**told, "finish_reason": choice.finish_reason}

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

    def _logprobs(self, found: list[TokenLogprob], offset: int) -> Event:
        if self.chat:
            content = [
                {
                    **self._token(one.token, one.logprob),
                    "top_logprobs": [self._token(*pair) for pair in one.top],
                }
                for one in found
            ]
            return {"content": content, "refusal": None}
        told: Event = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in found:
            told["tokens"].append(self._name(one.token))
            told["token_logprobs"].append(one.logprob)
            told["top_logprobs"].append({self._name(id): value for id, value in one.top})
            told["text_offset"].append(offset)
            offset += len(self._text(one.token))
        return told

    def _token(self, id: int, logprob: float) -> Event:
        data = list(self.tokenizer.token_bytes(id))
        return {"token": self._text(id), "logprob": logprob, "bytes": data}

    def _name(self, id: int) -> str:
        """A token as a key: its text, or ``bytes:\\xNN`` where that is a part of a character."""
        data = self.tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _text(self, id: int) -> str:
        return self.tokenizer.token_bytes(id).decode(errors="replace")


def ended_badly(piece: Piece) -> ApiError:
    """The error of an answer that the engine ended."""
    if piece.finish_reason == "cancelled":
        return stopping()
    return ApiError(f"the answer failed: {piece.error}", status=500, kind="server_error")


def stopping() -> ApiError:
    return ApiError(
        "the server is stopping", status=503, kind="server_error", code="stopping",
        headers={"retry-after": "5"},
    )  # fmt: skip


def sse(event: Event | str) -> bytes:
    """A server-sent event."""
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    return f"data: {data}\n\n".encode()
