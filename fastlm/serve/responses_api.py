"""Requests to /v1/responses, OpenAI's newer API, read as requests for a chat.

The server keeps no state but what users let it keep: ``previous_response_id`` names a stored
answer. Tools are functions; OpenAI's own (search, files, code) are refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message, messages_of
from fastlm.errors import InputError
from fastlm.serve.fields import (
    ApiError,
    Field,
    choice,
    flag,
    identifier,
    list_of,
    read_fields,
    schema_of,
    table,
    text,
    whole,
    wrong,
)
from fastlm.serve.forms import RESPONSE_FORMAT, SCHEMA, response_form
from fastlm.serve.messages import MESSAGES, MOST_MESSAGES
from fastlm.serve.openai_api import CHAT, IGNORED, LABEL, ChatAsked, chat_fields, read_body
from fastlm.serve.tools import FUNCTION, MOST_TOOLS, check_tools

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore

LOGPROBS = "message.output_text.logprobs"
ROLES = ("user", "assistant", "system", "developer")
MOST_TEXT = 2**26
STATUS = choice("in_progress", "completed", "incomplete")
ANYTHING = Field(lambda value, name: value, {})
# parts and items as clients send them, and as they send ours back


def _kind(value: str, required: bool = True) -> dict[str, Field]:
    one = choice(value)
    return {"type": Field(one.read, one.schema, required=required)}


TEXT = {"text": text(MOST_TEXT, required=True, empty=True)}
PARTS: Mapping[str, Mapping[str, Field]] = {
    "input_text": {**_kind("input_text"), **TEXT},
    "output_text": {
        **_kind("output_text"), **TEXT, "annotations": ANYTHING, "logprobs": ANYTHING,
    },
}  # fmt: skip


def _content(value: Any, name: str) -> str:
    """The text of a content or an output: a text, or parts that are joined."""
    if isinstance(value, str):
        return text(MOST_TEXT, empty=True).read(value, name)
    if not isinstance(value, list):
        raise wrong(name, "a text or a list of parts", value)
    found = []
    for i, part in enumerate(value):
        where = f"{name}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        fields = PARTS.get(kind) if isinstance(kind, str) else None
        if fields is None:
            raise ApiError(
                f"{where}: expected a part of type {' or '.join(PARTS)}, got another: this server"
                " reads text and fetches no URL",
                param=where,
            )
        found.append(read_fields(part, fields, where)["text"])
    return "".join(found)


CONTENT = Field(
    _content,
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"anyOf": [schema_of(part) for part in PARTS.values()]}},
        ]
    },
    required=True,
)
ITEM = {"id": LABEL, "status": STATUS}
CALL_ID = text(2**10, required=True)
ROLE = Field(choice(*ROLES).read, choice(*ROLES).schema, required=True)
ITEMS: Mapping[str, Mapping[str, Field]] = {
    "message": {
        **_kind("message", required=False), **ITEM, "role": ROLE, "content": CONTENT,
        "phase": LABEL,
    },
    "function_call": {
        **_kind("function_call"), **ITEM, "call_id": CALL_ID, "name": text(2**10, required=True),
        "arguments": text(MOST_TEXT, required=True),
    },
    "function_call_output": {
        **_kind("function_call_output"), **ITEM, "call_id": CALL_ID, "output": CONTENT,
    },
}  # fmt: skip


def _input(value: Any, name: str) -> list[Message]:
    """The messages of an input: a text, or items. Calls belong to the message before them."""
    if isinstance(value, str):
        content = text(MOST_TEXT).read(value, name)
        return [{"role": "user", "content": content}]
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong(name, f"a text or a list of 1 to {MOST_MESSAGES} items", value)
    messages: list[Message] = []
    for i, item in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(item, dict):
            raise wrong(where, "an object", item)
        kind = item.get("type") or "message"
        if not isinstance(kind, str) or kind not in ITEMS:
            raise wrong(f"{where}.type", f"one of {', '.join(ITEMS)}", kind)
        given = read_fields(item, ITEMS[kind], where)
        if kind == "message":
            messages.append({"role": given["role"], "content": given["content"]})
        elif kind == "function_call":
            call = _call(given, where)
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        else:
            called = {"tool_call_id": given["call_id"], "content": given["output"]}
            messages.append({"role": "tool", **called})
    return MESSAGES.read(messages, name)


def _call(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(given["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong(f"{where}.arguments", "an object as JSON in a text", given["arguments"])
    function = {"name": given["name"], "arguments": given["arguments"]}
    return {"id": given["call_id"], "type": "function", "function": function}


TOOL = {**_kind("function"), **FUNCTION}


def _tools(value: Any, name: str) -> list[Any] | None:
    """Functions, as `fastlm.serve.tools.check_tools` returns them."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise wrong(name, f"a list of at most {MOST_TOOLS} tools", value)
    tools = []
    for i, tool in enumerate(value):
        if isinstance(tool, dict) and tool.get("type") != "function":
            raise wrong(f"{name}[{i}].type", "'function'", tool.get("type"))
        given = read_fields(tool, TOOL, f"{name}[{i}]")
        function = {key: given[key] for key in FUNCTION if tool.get(key) is not None}
        tools.append({"type": "function", "function": function})
    try:
        return check_tools(tools, name)
    except ApiError as error:
        raise _renamed(error) from None


def _renamed(error: ApiError) -> ApiError:
    """An error about a chat's tools, which have their fields in ``function``."""
    param = None if error.param is None else error.param.replace(".function", "")
    return ApiError(str(error).replace(".function", ""), param=param)


CHOSEN = {"type": choice("function"), "name": text(64, required=True)}


def _tool_choice(value: Any, name: str) -> str | dict[str, Any]:
    if isinstance(value, dict):
        return {"name": read_fields(value, CHOSEN, name)["name"]}
    return choice("auto", "none", "required").read(value, name)


FORMAT = {
    "type": RESPONSE_FORMAT["type"], "name": text(64), "description": text(1024, empty=True),
    "schema": SCHEMA, "strict": flag(True),
}  # fmt: skip
LIKE_CHAT = (
    "model temperature top_p stream store conversation_id parallel_tool_calls chat_template_kwargs"
    " frequency_penalty ignore_eos logit_bias min_p min_tokens presence_penalty repetition_penalty"
    " seed stop stop_token_ids top_k"
).split()
UNCHANGED = (
    "metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier user".split()
)
RESPONSES: Mapping[str, Field] = {
    **{name: CHAT[name] for name in LIKE_CHAT},
    **{name: IGNORED[name] for name in UNCHANGED},
    "background": choice(False),
    "include": list_of(choice(LOGPROBS, "reasoning.encrypted_content"), 0, 8),
    "input": Field(
        _input,
        {
            "anyOf": [
                text(MOST_TEXT).schema,
                {
                    "type": "array",
                    "items": {"anyOf": [schema_of(item) for item in ITEMS.values()]},
                    "minItems": 1,
                    "maxItems": MOST_MESSAGES,
                },
            ]
        },
        required=True,
    ),
    "instructions": text(MOST_TEXT, empty=True),
    "max_output_tokens": whole(1, 2**31),
    "max_tool_calls": whole(1, 2**31),  # of OpenAI's own tools, which this server has not
    "previous_response_id": identifier(),
    "reasoning": table({"effort": LABEL, "summary": LABEL, "generate_summary": LABEL}),
    "stream_options": table({"include_obfuscation": flag()}),
    "text": table({"format": table(FORMAT), "verbosity": LABEL}),
    "tool_choice": Field(
        _tool_choice, {"anyOf": [{"enum": ["auto", "none", "required"]}, schema_of(CHOSEN)]}
    ),
    "tools": Field(_tools, {"type": "array", "items": schema_of(TOOL), "maxItems": MOST_TOOLS}),
    "top_logprobs": whole(0, CHAT["top_logprobs"].schema["maximum"]),
    "truncation": choice("disabled"),
}


@dataclass(frozen=True)
class ResponsesAsked(ChatAsked):
    """``told``: fields of the request that the response repeats. ``previous``: the id of the answer
    that this one follows; ``instructions``: whether the messages begin with some."""

    told: Mapping[str, Any]
    previous: str | None
    instructions: bool


def responses_asked(body: Any) -> ResponsesAsked:
    """What a body of /v1/responses asks for. ApiError names the field."""
    given = read_body(body, RESPONSES)
    reasoning, form = given["reasoning"] or {}, (given["text"] or {}).get("format")
    top = given["top_logprobs"] if LOGPROBS not in given["include"] else given["top_logprobs"] or 0
    messages = given["input"]
    if given["instructions"]:
        messages = [{"role": "system", "content": given["instructions"]}, *messages]
    chat = {name: field.default for name, field in CHAT.items()}
    chat |= {name: given[name] for name in (*LIKE_CHAT, *UNCHANGED)}
    chat |= {
        "messages": messages, "max_tokens": given["max_output_tokens"], "tools": given["tools"],
        "tool_choice": given["tool_choice"], "reasoning_effort": reasoning.get("effort"),
        "verbosity": (given["text"] or {}).get("verbosity"),
    }  # fmt: skip
    if given["conversation_id"] is not None and not given["store"]:
        raise ApiError("conversation_id: wanted with store true", param="conversation_id")
    try:
        fields = chat_fields(chat, top, _form(form))
    except ApiError as error:
        raise _renamed(error) from None
    return ResponsesAsked(
        **fields, told=_told(body, given),
        previous=given["previous_response_id"], instructions=bool(given["instructions"]),
    )  # fmt: skip


def _form(given: Mapping[str, Any] | None) -> Any:
    if given is None:
        return None
    try:
        form = response_form({"type": given["type"], "json_schema": {"schema": given["schema"]}})
    except ApiError:
        at = "text.format.schema"
        raise ApiError(f"{at}: expected a JSON schema, got none", param=at) from None
    return None if form is None else replace(form, param="text.format")


def _told(body: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a response that repeat those of its request."""
    sampled = {name: given[name] for name in ("temperature", "top_p")}
    format = {"type": "text", **((body.get("text") or {}).get("format") or {})}
    return {
        **sampled,
        "instructions": given["instructions"],
        "max_output_tokens": given["max_output_tokens"],
        "metadata": given["metadata"] or {},
        "parallel_tool_calls": given["parallel_tool_calls"] is not False,
        "previous_response_id": given["previous_response_id"],
        "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})},
        "store": given["store"],
        "text": {"format": format},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_logprobs": given["top_logprobs"] or 0,
        "truncation": "disabled",
        "user": given["user"],
    }


def continued(asked: ResponsesAsked, store: "FeedbackStore | None") -> ResponsesAsked:
    """The request with the conversation before it. New instructions replace the old ones.

    ApiError: the server has not kept it.
    """
    param = "previous_response_id"
    if store is None:
        raise ApiError(
            f"{param}: this server keeps no conversations (fastlm serve --feedback): send the whole"
            " conversation as input",
            param=param,
        )
    assert asked.previous is not None
    try:
        kept = store.answer(asked.previous)
    except InputError:
        raise ApiError(
            f"{param}: the database of conversations cannot be read now", status=503, param=param,
            kind="server_error",
        ) from None  # fmt: skip
    if kept is None or not kept.choices:  # a stranger's database has what it likes
        raise ApiError(
            f"{param}: expected a response that was stored (store: true), got"
            f" {asked.previous!r}: send the whole conversation as input",
            param=param, code="previous_response_not_found",
        )  # fmt: skip
    before = [*kept.prompt, *kept.choices[0]]
    if asked.instructions and before and before[0]["role"] == "system":
        before = before[1:]
    before = [message for _, message in messages_of(before, param)]
    at = int(asked.instructions)
    # what is stored of a continuation belongs to what it continues: to forget one forgets both
    conversation = asked.conversation_id
    if asked.store and conversation is None:
        conversation = kept.conversation_id or asked.previous
    messages = [*asked.messages[:at], *before, *asked.messages[at:]]
    return replace(asked, messages=messages, conversation_id=conversation)
