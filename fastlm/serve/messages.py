"""The messages of a chat request, which are text."""

from collections.abc import Mapping
from typing import Any

from fastlm.data.conversations import Message, messages_of
from fastlm.serve.fields import (
    ApiError,
    Field,
    check_values,
    choice,
    list_of,
    table,
    text,
    whole,
    wrong,
)

MOST_MESSAGES = 4096
ROLES: Mapping[str, tuple[str, ...]] = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}


def _arguments(value: Any, name: str) -> Any:
    if not isinstance(value, str | dict):
        raise wrong(name, "an object, or one as JSON in a text", value)
    return value


JSON_TEXT = {"type": "string", "contentMediaType": "application/json"}
CALLED = table(
    {
        "name": text(2**10, required=True),
        "arguments": Field(_arguments, {"anyOf": [JSON_TEXT, {"type": "object"}]}),
    }
)
CALL = {
    "id": text(2**10),
    "index": whole(0, 2**31 - 1),
    "type": choice("function"),
    "function": Field(CALLED.read, CALLED.schema, required=True),
}
CALLS = list_of(table(CALL), 0, 1024)
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]}


def _message(role: str, **more: Any) -> dict[str, Any]:
    """JSON schema of a role's messages; ``more``: fields that need not be there. What is empty
    counts as missing.
    """
    given: dict[str, Any] = {"role": {"const": role}, "content": CONTENT}
    schema = {"type": "object", "properties": given | more, "required": list(given)}
    return {**schema, "additionalProperties": {"enum": [None, []]}}


SOME_TEXT = {"type": ["string", "null"]}
SOME_CALLS = {"anyOf": [CALLS.schema, {"type": "null"}]}
MESSAGE = {
    "anyOf": [
        *(_message(role, name=SOME_TEXT) for role in ("system", "developer", "user")),
        _message("tool", tool_call_id=SOME_TEXT, name=SOME_TEXT),
        _message("assistant", name=SOME_TEXT, tool_calls=SOME_CALLS, reasoning_content=SOME_TEXT),
        {
            **_message(
                "assistant",
                tool_calls={**CALLS.schema, "minItems": 1},
                content={"type": "null"},
                name=SOME_TEXT,
            ),
            "required": ["role", "tool_calls"],
        },
    ]
}


def _read(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong(name, f"a list of 1 to {MOST_MESSAGES} messages", value)
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise wrong(where, "an object", message)
        role = message.get("role")
        known = ROLES.get(role) if isinstance(role, str) else None
        if known is None:
            raise wrong(f"{where}.role", f"one of {', '.join(ROLES)}", role)
        for key, given in message.items():
            if key not in known and given is not None and given != []:
                raise ApiError(
                    f"{where}.{key:.80}: not supported; wanted only {', '.join(known)}",
                    param=f"{where}.{key:.80}",
                )
        for key in ("reasoning_content", "tool_call_id", "name"):
            if not isinstance(message.get(key), str | None):
                raise wrong(f"{where}.{key}", "a text", message[key])
        if (calls := message.get("tool_calls")) is not None:
            CALLS.read(calls, f"{where}.tool_calls")
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict) or part.get("type") != "text" or len(part) != 2:
                at = f"{where}.content[{j}]"
                raise ApiError(
                    f"{at}: wanted a part of type 'text', got another: this server reads text and"
                    " fetches no URL",
                    param=at,
                )
        if content is None and not message.get("tool_calls"):
            at = f"{where}.content"
            raise ApiError(f"{at}: wanted a text or a list of parts, got none", param=at)
    try:
        messages = [message for _, message in messages_of(value, name)]
        check_values(messages, name)  # a call's arguments were JSON in a text
        return messages
    except RecursionError:
        raise wrong(name, "messages that are not nested deeper", "deeper ones") from None


MESSAGES = Field(
    _read,
    {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": MOST_MESSAGES},
    required=True,
)
