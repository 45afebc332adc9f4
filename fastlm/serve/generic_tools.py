"""Give tools to a model that has no chat template for them, as llama.cpp's generic format does: the
system message lists the tools, and a grammar constrains the answer.

The answer is JSON: ``{"tool_calls": [{"name", "arguments"}]}`` or ``{"response": TEXT}``; TEXT is
the message. Earlier calls and the results of tools become JSON in the messages.
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from fastlm.data.conversations import Message
from fastlm.inference.output_format import GenericTools, OutputFormat
from fastlm.inference.tool_parser import parse_calls

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
    request: "ChatCompletionRequest", unsupported_reason: Callable[[str], str | None]
) -> tuple[list[Message], list[Any] | None, OutputFormat | None]:
    """Return messages, tools and output format for a model: those of the request if its chat
    template writes tools and calls, else those of the generic format. ``unsupported_reason``:
    `fastlm.serve.prompt_encoder.PromptEncoder.unsupported_reason`."""
    messages, tools, output_format = request.messages, request.tools, request.output_format
    has_calls = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    if has_calls and unsupported_reason("tool calls"):
        messages = _calls_as_text(messages)
    if tools is None or not unsupported_reason("tools"):
        return messages, tools, output_format
    required, response = False, ANY_TEXT
    if output_format is not None and output_format.kind == "call":
        tools, required = output_format.value, True
    elif output_format is not None and output_format.kind == "calls_or":
        inner: OutputFormat = output_format.value[2]
        response = {"type": "object"} if inner.kind == "json_object" else inner.value
    text = (REQUIRED if required else SYSTEM).format(
        tools=json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    )
    role = "user" if unsupported_reason("a system message") else "system"
    first, *rest = messages
    if first["role"] == role:
        messages = [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]
    else:
        messages = [{"role": role, "content": text}, *messages]
    # one call unless the request allows several: a small model does not end a list
    value = GenericTools(tools, request.parallel_tool_calls is True, required, response)
    param = (
        "tools" if output_format is None or output_format.kind == "calls" else output_format.param
    )
    return messages, None, OutputFormat("generic", value, param)


def _calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Write calls as text of the assistant, and results as text of the user. Consecutive messages
    of the user are joined, since templates need alternating roles."""
    converted: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            keys = ("name", "arguments")
            functions = [{key: call["function"][key] for key in keys} for call in calls]
            text = json.dumps({"tool_calls": functions}, ensure_ascii=False)
            content = f"{message['content']}\n{text}" if message.get("content") else text
            converted.append({"role": "assistant", "content": content})
        elif message["role"] == "tool":
            names = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
            result = {"tool_response": {**names, "content": message["content"]}}
            content = json.dumps(result, ensure_ascii=False)
            if converted and converted[-1]["role"] == "user":
                content = f"{converted.pop()['content']}\n{content}"
            converted.append({"role": "user", "content": content})
        else:
            converted.append(message)
    return converted


class GenericToolParser:
    """Parses an answer in the generic format, as `fastlm.inference.tool_parser.ToolParser` does
    others. `push` returns the text of ``response`` while it arrives; `end` parses all else."""

    def __init__(self, names: Collection[str]):
        self.names = names
        self.tool_calls: list[dict[str, Any]] = []
        self._buffer = ""
        self._text: str | None = None  # the part of the response's text that was returned

    def push(self, piece: str) -> str:
        self._buffer += piece
        try:
            value = from_json(self._buffer, allow_partial="trailing-strings")
        except ValueError:  # nothing yet, or half a surrogate pair, which delays all after it
            return ""
        return self._new_text(value)

    def _new_text(self, value: Any) -> str:
        """Return the text of the response that was not returned before."""
        text = value.get("response") if isinstance(value, dict) else None
        if not isinstance(text, str):
            return ""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        before, self._text = self._text or "", text
        return text[len(before) :]

    def end(self) -> str:
        try:
            value = json.loads(self._buffer, strict=False)
        except (ValueError, RecursionError):  # cut at the limit of tokens
            return self._buffer if self._text is None else ""
        if isinstance(value, dict) and "tool_calls" in value:
            self.tool_calls = parse_calls(value["tool_calls"], self.names)
            return "" if self.tool_calls else self._buffer
        if not isinstance(value, dict) or set(value) != {"response"}:
            return self._buffer
        if isinstance(value["response"], str):
            return self._new_text(value)
        text = json.dumps(value["response"], ensure_ascii=False)
        return text.encode(errors="replace").decode()
