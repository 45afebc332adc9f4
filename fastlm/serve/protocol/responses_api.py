"""The request of ``POST /v1/responses``, OpenAI's newer API; it is converted to a chat request.

The server stores only the responses whose users consent: ``previous_response_id`` names a stored
one. Tools are functions; OpenAI's own tools (search, files, code) are refused.
"""

import json
from functools import cached_property
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidateAs,
    WrapValidator,
    model_validator,
)
from typing_extensions import TypedDict

from fastlm.data.conversations import Message
from fastlm.serve.api_error import ApiError, field_error
from fastlm.serve.protocol.body import (
    AlwaysFalse,
    EmptyOrText,
    Identifier,
    Label,
    PositiveInt,
    Text,
    check_json_texts,
    reject,
    validate,
)
from fastlm.serve.protocol.chat_completion import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatCompletionRequest,
    FormatType,
    FunctionDefinition,
    FunctionName,
    NamedSchema,
    ShortText,
    TemplateVariables,
    ToolMode,
    text_part,
)
from fastlm.serve.protocol.completion import SamplingRequest, TopLogprobs

LOGPROBS = "message.output_text.logprobs"
# names of a chat's fields in errors -> names in this API
ERROR_NAMES = {".function": "", "messages": "input"}


class InputText(TypedDict):
    type: Literal["input_text"]
    text: EmptyOrText


class OutputText(TypedDict):  # part of a response that a client sends back
    type: Literal["output_text"]
    text: EmptyOrText
    annotations: NotRequired[Any]
    logprobs: NotRequired[Any]


PARTS = "input_text", "output_text"
ContentPart = Annotated[
    Annotated[InputText | OutputText, Field(discriminator="type")], text_part(*PARTS)
]
Content = Annotated[
    str | Annotated[list[ContentPart], Field(fail_fast=True)], Field(union_mode="left_to_right")
]  # fmt: skip


class ResponseItem(TypedDict):
    id: NotRequired[Label | None]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"] | None]


class MessageItem(ResponseItem):
    type: NotRequired[Literal["message"] | None]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: NotRequired[Label | None]


def _json_object(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return text if isinstance(value, dict) else reject("an object as JSON in a text")


class FunctionCallItem(ResponseItem):
    type: Literal["function_call"]
    call_id: ShortText
    name: ShortText
    arguments: Annotated[Text, AfterValidator(_json_object)]


class FunctionCallOutputItem(ResponseItem):
    type: Literal["function_call_output"]
    call_id: ShortText
    output: Content


ITEMS = "message", "function_call", "function_call_output"


def _item_kind(item: Any) -> str | None:
    kind = (item.get("type") or "message") if isinstance(item, dict) else "message"
    return kind if kind in ITEMS else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")],
    Discriminator(
        _item_kind, custom_error_type="expected",
        custom_error_message=f"an item of type {', '.join(ITEMS)}",
    ),
]  # fmt: skip


def _check_arguments(items: Any) -> Any:
    objects = (item for item in items if isinstance(item, dict))
    arguments = (item.get("arguments") for item in objects)
    check_json_texts(text for text in arguments if isinstance(text, str))
    return items


Input = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_check_arguments),
        Tag("items"),
    ],
    Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
]


class ResponsesTool(FunctionDefinition):
    type: Literal["function"]


def _to_chat_tools(tools: Any, handler: Any) -> list[Any]:
    """Convert tools to the format of a chat request, and keep the order of their keys."""
    handler(tools)
    functions = [
        {key: value for key, value in tool.items() if key != "type" and value is not None}
        for tool in tools
    ]
    return [{"type": "function", "function": function} for function in functions]


ResponsesTools = Annotated[
    list[Any],
    ValidateAs(Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)], list),
    WrapValidator(_to_chat_tools),
]


class NamedFunction(FunctionName):
    type: NotRequired[Literal["function"] | None]


class TextFormat(NamedSchema, total=False):
    type: FormatType | None


class TextOptions(TypedDict, total=False):
    format: TextFormat | None
    verbosity: Label | None


class Reasoning(TypedDict, total=False):
    effort: Label | None
    summary: Label | None
    generate_summary: Label | None


class ResponsesStreamOptions(TypedDict, total=False):
    include_obfuscation: bool | None


class ResponsesChatRequest(ChatCompletionRequest):
    """A `ResponsesRequest`, converted to a chat request."""

    format_field = "text.format"
    response_fields: dict[str, Any]  # fields of the request that its response contains, too


class ResponsesRequest(SamplingRequest):
    input: Input
    instructions: EmptyOrText | None = None
    max_output_tokens: PositiveInt | None = None
    max_tool_calls: PositiveInt | None = None  # of OpenAI's own tools, which this server lacks
    previous_response_id: Identifier | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: ResponsesTools | None = None
    tool_choice: ToolMode | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
        Field(max_length=8),
    ] = []
    top_logprobs: TopLogprobs | None = None
    store: bool = False  # the user consents that the conversation is stored
    conversation_id: Identifier | None = None
    stream_options: ResponsesStreamOptions | None = None
    background: AlwaysFalse = False
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.chat
        return self

    @cached_property
    def chat(self) -> ResponsesChatRequest:
        """The same request in the format of /v1/chat/completions."""
        try:
            return validate(self._chat_body(), ResponsesChatRequest)
        except ApiError as error:
            message, param = str(error), error.param or ""
            for name, new_name in ERROR_NAMES.items():
                message, param = message.replace(name, new_name), param.replace(name, new_name)
            raise ApiError(message, param=param) from None

    def _chat_body(self) -> dict[str, Any]:
        shared = self.model_fields_set & ChatCompletionRequest.model_fields.keys()
        body = {name: getattr(self, name) for name in shared - {"stream_options", "top_logprobs"}}
        text, format = self.text or {}, (self.text or {}).get("format")
        if format is not None:
            schema = format.get("schema")
            if format.get("type") == "json_schema" and schema is None:
                raise field_error("text.format.schema", "expected a JSON schema, got nothing")
            kind = format.get("type")
            body["response_format"] = {"type": kind, "json_schema": {"schema": schema}}
        if LOGPROBS in self.include or self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if isinstance(self.tool_choice, dict):
            body["tool_choice"] = {"function": {"name": self.tool_choice["name"]}}
        return body | {
            "messages": self._messages(), "max_tokens": self.max_output_tokens,
            "reasoning_effort": (self.reasoning or {}).get("effort"),
            "verbosity": text.get("verbosity"), "response_fields": self._response_fields(),
        }  # fmt: skip

    def _messages(self) -> list[Message]:
        """Convert the input to messages. A call belongs to the message before it."""
        messages: list[Message] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items: Any = self.input
        if isinstance(items, str):
            return [*messages, {"role": "user", "content": items}]
        for item in items:
            kind = item.get("type")
            if kind == "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
                continue
            content = item["output" if kind == "function_call_output" else "content"]
            if not isinstance(content, str):
                content = "".join(part["text"] for part in content)
            if kind == "function_call_output":
                message = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
            else:
                message = {"role": item["role"], "content": content}
            messages.append(message)
        return messages

    def _response_fields(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "instructions", "max_output_tokens", "store", "user")
        names += ("previous_response_id",)
        return {
            **{name: getattr(self, name) for name in names},
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": {"effort": None, "summary": None, **(self.reasoning or {})},
            "text": {"format": {"type": "text", **((self.text or {}).get("format") or {})}},
            "tool_choice": self.tool_choice or "auto",
            "tools": [{"type": "function", **tool["function"]} for tool in self.tools or []],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
        }
