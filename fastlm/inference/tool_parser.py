"""Parse tool calls from an answer, for requests with tools. Two formats are recognised:

- ``<tool_call>JSON</tool_call>``, any number of them in a text (Hermes, Qwen, SmolLM);
- an answer that is entirely JSON (Llama 3, Mistral, which mark calls by special tokens).

JSON is ``{"name", "arguments" or "parameters"}`` or a list of those. A call of a tool that the
request does not have is text. An answer that begins with ``[`` or ``{`` is buffered to its end, and
so is what follows a ``<tool_call>``. `fastlm.serve.generic_tools` has the format for models that
have no template for tools.
"""

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fastlm.inference.answer_text import split_at_stop
from fastlm.inference.output_format import CLOSE, OPEN

DECODER = json.JSONDecoder()


@dataclass
class ToolParser:
    """Separates an answer's text from its tool calls while it arrives. `push` and `end` return the
    text; `end` sets ``tool_calls``, in OpenAI's format.

    ``names``: of the tools. ``json_answer``: parse an answer that is entirely JSON, too.
    """

    names: Collection[str]
    json_answer: bool = True
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    _buffer: str = ""
    _has_text: bool = False  # text was returned: the answer is not entirely JSON

    def push(self, piece: str) -> str:
        self._buffer += piece
        if self.json_answer and not self._has_text:
            start = self._buffer.lstrip()
            if not start or start[0] in "{[":
                return ""
        text, *_ = split_at_stop(self._buffer, (OPEN,))
        self._buffer = self._buffer[len(text) :]
        self._has_text = self._has_text or bool(text.strip())
        return text

    def end(self) -> str:
        """Return the rest of the text."""
        text, self._buffer = self._buffer, ""
        parsed = self._parse(text, 0) if self.json_answer and not self._has_text else None
        if parsed is not None and not text[parsed[1] :].strip():
            self.tool_calls = parsed[0]
            return ""
        rest, self.tool_calls = self._split(text)
        return rest if rest.strip() or not self.tool_calls else ""

    def _split(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Split ``text`` into the text outside calls and the calls; the last one may lack its
        `CLOSE`."""
        outside, calls, position = "", [], 0
        while (begin := text.find(OPEN, position)) >= 0:
            inside = begin + len(OPEN)
            if (parsed := self._parse(text, inside)) is None:
                outside, position = outside + text[position:inside], inside
                continue
            outside += text[position:begin]
            calls += parsed[0]
            position = _skip_space(text, parsed[1])
            has_close = text.startswith(CLOSE, position)
            position = position + len(CLOSE) if has_close else parsed[1]
        return outside + text[position:], calls

    def _parse(self, text: str, start: int) -> tuple[list[dict[str, Any]], int] | None:
        """Parse the calls of the JSON at ``start``; return them and their end. None: no calls."""
        try:
            value, end = DECODER.raw_decode(text, _skip_space(text, start))
        except (ValueError, RecursionError):
            return None
        calls = parse_calls(value if isinstance(value, list) else [value], self.names)
        return (calls, end) if calls else None


class CallsOrTextParser(ToolParser):
    """Parses an answer that is calls only or text only; its beginning decides. Constrained text may
    quote a call, so it is not searched for calls.
    """

    def __init__(self, names: Collection[str]):
        super().__init__(names, json_answer=False)
        self._is_text: bool | None = None  # None: unknown so far

    def push(self, piece: str) -> str:
        if self._is_text is None:
            self._buffer += piece
            start = self._buffer.lstrip()
            if OPEN.startswith(start):
                return ""
            self._is_text = not start.startswith(OPEN)
            piece, self._buffer = self._buffer if self._is_text else start, ""
        return piece if self._is_text else super().push(piece)

    def end(self) -> str:
        if self._is_text is not False:
            text, self._buffer = self._buffer, ""
            return text
        return super().end()


def parse_calls(values: Collection[Any], names: Collection[str]) -> list[dict[str, Any]]:
    """Convert each ``{"name", "arguments" or "parameters"}`` to a call in OpenAI's format.

    Return an empty list if one of them has another format or none of the ``names``.
    """
    calls = [_parse_call(value, names) for value in values]
    return [] if None in calls else [call for call in calls if call]


def _parse_call(call: Any, names: Collection[str]) -> dict[str, Any] | None:
    if not isinstance(call, dict) or call.get("name") not in names:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    try:
        if isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            # a model may write the escape of a lone surrogate, which UTF-8 cannot encode
            arguments = text if _is_unicode(text) else json.dumps(arguments)
    except (ValueError, RecursionError):  # NaN, which JSON does not have; deep nesting
        return None
    if not isinstance(arguments, str) or not _is_unicode(arguments):
        return None
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _skip_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text
