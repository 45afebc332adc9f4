"""The calls of tools in an answer. Recognised, where the request has tools:

- ``<tool_call>JSON</tool_call>``, any number of them in a text (Hermes, Qwen, SmolLM);
- an answer that is JSON as a whole (Llama 3, Mistral, whose marks are special tokens).

An answer that begins with ``[`` or ``{`` is held back to its end, as is what follows a
``<tool_call>``.
JSON is ``{"name", "arguments" or "parameters"}`` or a list of those. A call of a tool that the
request does not have is text. Models whose template writes no tools have a form of their own
(`fastlm.serve.generic_tools`).
"""

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fastlm.inference.answer_text import split_at_stop
from fastlm.inference.forms import CLOSE, OPEN

DECODER = json.JSONDecoder()


@dataclass
class ToolText:
    """An answer's text as it arrives: `push` and `end` return what is text for certain, and `end`
    sets ``calls``, in OpenAI's shape. ``whole``: an answer that is JSON as a whole is read, too.
    """

    names: Collection[str]
    whole: bool = True
    calls: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""
    _began: bool = False  # text was passed on: the answer is not JSON as a whole

    def push(self, piece: str) -> str:
        self._held += piece
        if self.whole and not self._began:
            start = self._held.lstrip()
            if not start or start[0] in "{[":
                return ""
        ready, *_ = split_at_stop(self._held, (OPEN,))
        self._held = self._held[len(ready) :]
        self._began = self._began or bool(ready.strip())
        return ready

    def end(self) -> str:
        """Return the rest of the text."""
        text, self._held = self._held, ""
        whole = self._read(text, 0) if self.whole and not self._began else None
        if whole is not None and not text[whole[1] :].strip():
            self.calls = whole[0]
            return ""
        rest, self.calls = self._blocks(text)
        return rest if rest.strip() or not self.calls else ""

    def _blocks(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """``text`` without its calls, and those; the last may lack its `CLOSE`."""
        said, calls, at = "", [], 0
        while (begin := text.find(OPEN, at)) >= 0:
            inside = begin + len(OPEN)
            if (found := self._read(text, inside)) is None:
                said, at = said + text[at:inside], inside
                continue
            said += text[at:begin]
            calls += found[0]
            at = _after_space(text, found[1])
            at = at + len(CLOSE) if text.startswith(CLOSE, at) else found[1]
        return said + text[at:], calls

    def _read(self, text: str, at: int) -> tuple[list[dict[str, Any]], int] | None:
        """The calls of the JSON that begins at ``at``, and where it ends; None: no calls."""
        try:
            value, end = DECODER.raw_decode(text, _after_space(text, at))
        except (ValueError, RecursionError):
            return None
        calls = calls_of(value if isinstance(value, list) else [value], self.names)
        return (calls, end) if calls else None


class CallsOrText(ToolText):
    """An answer that is either calls or, where it begins otherwise, text to its end: a text of some
    form may quote a call.
    """

    def __init__(self, names: Collection[str]):
        super().__init__(names, whole=False)
        self._is_text: bool | None = None  # None: it is not known yet

    def push(self, piece: str) -> str:
        if self._is_text is None:
            self._held += piece
            start = self._held.lstrip()
            if OPEN.startswith(start):
                return ""
            self._is_text = not start.startswith(OPEN)
            piece, self._held = self._held if self._is_text else start, ""
        return piece if self._is_text else super().push(piece)

    def end(self) -> str:
        if self._is_text is not False:
            text, self._held = self._held, ""
            return text
        return super().end()


def calls_of(values: Collection[Any], names: Collection[str]) -> list[dict[str, Any]]:
    """Calls in OpenAI's shape of ``{"name", "arguments" or "parameters"}``. None of them where one
    has another shape or none of the ``names``."""
    calls = [_call(value, names) for value in values]
    return [] if None in calls else [call for call in calls if call]


def _call(call: Any, names: Collection[str]) -> dict[str, Any] | None:
    if not isinstance(call, dict) or call.get("name") not in names:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    try:
        if isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            # a model may write the escape of a lone surrogate, which UTF-8 cannot encode
            arguments = text if _is_unicode(text) else json.dumps(arguments)
    except ValueError:  # NaN, which JSON does not have
        return None
    if not isinstance(arguments, str) or not _is_unicode(arguments):
        return None
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _after_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text
