"""Tools for a model whose chat template does not write them: a form in the system message, and a
grammar for the answer, as llama.cpp's generic format has them.

The answer is JSON: ``{"tool_calls": [{"name", "arguments"}]}`` or ``{"response": TEXT}``, whose
text alone is the message. Earlier calls and the tools' results become text of the same kind.
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from fastlm.data.conversations import Message
from fastlm.inference.forms import Form, GenericTools
from fastlm.serve.tools import calls_of

if TYPE_CHECKING:
    from fastlm.serve.protocol.chat_completion import ChatCompletionRequest

SYSTEM = (
    "You can call these functions to answer the user, given as JSON:\n{tools}\n\n"
    'Answer in JSON, either with {{"tool_calls": [{{"name": NAME, "arguments": {{...}}}}]}} to call'
    ' functions, or with {{"response": TEXT}} to reply to the user.'
)
REQUIRED = (
    "You can call these functions to answer the user, given as JSON:\n{tools}\n\n"
    'Answer in JSON: {{"tool_calls": [{{"name": NAME, "arguments": {{...}}}}]}}.'
)
ANY_TEXT = {"type": "string"}


def with_generic_tools(
    request: "ChatCompletionRequest", why_not: Callable[[str], str | None]
) -> tuple[list[Message], list[Any] | None, Form | None]:
    """Return messages, tools and form as a model takes them: those of the request where its chat
    template writes tools and calls, else the generic form. ``why_not``:
    `fastlm.serve.prompts.Prompts.why_not`."""
    messages, tools, form = request.messages, request.tools, request.form
    if any(m["role"] == "tool" or m.get("tool_calls") for m in messages) and why_not("tool calls"):
        messages = _plain(messages)
    if tools is None or not why_not("tools"):
        return messages, tools, form
    required, response = False, ANY_TEXT
    if form is not None and form.kind == "call":
        tools, required = form.value, True
    elif form is not None and form.kind == "calls_or":
        inner: Form = form.value[2]
        response = {"type": "object"} if inner.kind == "json_object" else inner.value
    text = (REQUIRED if required else SYSTEM).format(
        tools=json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    )
    role = "user" if why_not("a system message") else "system"
    first, *rest = messages
    if first["role"] == role:
        messages = [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]
    else:
        messages = [{"role": role, "content": text}, *messages]
    # one call unless several are asked for: a small model does not end a list
    value = GenericTools(tools, request.parallel_tool_calls is True, required, response)
    param = "tools" if form is None or form.kind == "calls" else form.param
    return messages, None, Form("generic", value, param)


def _plain(messages: Sequence[Message]) -> list[Message]:
    """Calls and results as text: of the assistant, and of the user, whose messages in a row are
    joined, since templates want turns."""
    found: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            keys = ("name", "arguments")
            called = [{key: call["function"][key] for key in keys} for call in calls]
            text = json.dumps({"tool_calls": called}, ensure_ascii=False)
            content = f"{message['content']}\n{text}" if message.get("content") else text
            found.append({"role": "assistant", "content": content})
        elif message["role"] == "tool":
            names = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
            told = {"tool_response": {**names, "content": message["content"]}}
            content = json.dumps(told, ensure_ascii=False)
            if found and found[-1]["role"] == "user":
                content = f"{found.pop()['content']}\n{content}"
            found.append({"role": "user", "content": content})
        else:
            found.append(message)
    return found


class GenericText:
    """As `fastlm.serve.tools.ToolText`, of an answer in the generic form: a response that is a text
    is passed on as it arrives, all else at the end."""

    def __init__(self, names: Collection[str]):
        self.names = names
        self.calls: list[dict[str, Any]] = []
        self._held = ""
        self._text: str | None = None  # what was passed on of a response that is a text

    def push(self, piece: str) -> str:
        self._held += piece
        try:
            value = from_json(self._held, allow_partial="trailing-strings")
        except ValueError:  # nothing yet, or half a surrogate pair, after which all waits
            return ""
        return self._pass_on(value)

    def _pass_on(self, value: Any) -> str:
        text = value.get("response") if isinstance(value, dict) else None
        if not isinstance(text, str):
            return ""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        before, self._text = self._text or "", text
        return text[len(before) :]

    def end(self) -> str:
        try:
            value = json.loads(self._held, strict=False)
        except (ValueError, RecursionError):  # cut at the limit of tokens
            return self._held if self._text is None else ""
        if isinstance(value, dict) and "tool_calls" in value:
            self.calls = calls_of(value["tool_calls"], self.names)
            return "" if self.calls else self._held
        if not isinstance(value, dict) or set(value) != {"response"}:
            return self._held
        if isinstance(value["response"], str):
            return self._pass_on(value)
        text = json.dumps(value["response"], ensure_ascii=False)
        return text.encode(errors="replace").decode()
