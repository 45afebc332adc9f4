"""The request of ``POST /v1/chat/completions``. Messages are text, and tools are functions."""

import json
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidateAs,
    WithJsonSchema,
    WrapValidator,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from fastlm.data.conversations import Message, parse_messages
from fastlm.errors import InputError
from fastlm.inference.output_format import OutputFormat
from fastlm.serve.api_error import field_error
from fastlm.serve.protocol.body import (
    INTEGER,
    STRICT,
    AlwaysFalse,
    Identifier,
    JsonSchema,
    PositiveInt,
    check_json_texts,
    reject,
)
from fastlm.serve.protocol.completion import GenerationRequest, TopLogprobs

MAX_MESSAGES = 4096
MAX_TOOLS = 128
# the variables of a chat template that the server sets
TEMPLATE_NAMES = frozenset(
    "messages tools documents add_generation_prompt date bos_token eos_token pad_token unk_token"
    " self check".split()
)


def text_part(*kinds: str) -> BeforeValidator:
    """Return a validator that accepts parts of a content of these ``kinds`` only."""
    expected = " or ".join(map(repr, kinds))

    def check(part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") in kinds:
            return part
        return reject(f"a part of type {expected} (this server reads text and fetches no URL)")

    return BeforeValidator(check)


class IgnoredKeys(TypedDict):
    """Keys in messages and tools that change nothing: Anthropic's cache_control, and what litellm
    adds to the answers of others."""

    cache_control: NotRequired[dict[str, Any] | None]
    provider_specific_fields: NotRequired[dict[str, Any] | None]


IGNORED_KEYS = tuple(IgnoredKeys.__annotations__)


@with_config(STRICT)
class TextPart(IgnoredKeys):
    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[Annotated[TextPart, text_part("text")]], Field(fail_fast=True)],
    Field(union_mode="left_to_right"),
]
ShortText = Annotated[str, Field(min_length=1, max_length=2**10)]
JsonText = Annotated[
    str, WithJsonSchema({"type": "string", "contentMediaType": "application/json"})
]


@with_config(STRICT)
class CalledFunction(IgnoredKeys):
    name: ShortText
    arguments: NotRequired[JsonText | dict[str, Any] | None]


@with_config(STRICT)
class ToolCall(IgnoredKeys):
    id: NotRequired[ShortText | None]
    index: NotRequired[Annotated[int, Field(ge=0, le=2**31 - 1), INTEGER] | None]
    type: NotRequired[Literal["function"] | None]
    function: CalledFunction


def _without_ignored(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in IGNORED_KEYS}


def ignored_keys(messages: list[Any], tools: list[Any] | None) -> set[str]:
    """Return the `IgnoredKeys` of messages, of their parts and calls, and of tools."""
    objects = [*messages, *(tools or ())]
    for message in messages:
        content, calls = message.get("content"), message.get("tool_calls") or ()
        objects += [*(content if isinstance(content, list) else ()), *calls]
        objects += [call["function"] for call in calls]
    return {key for item in objects for key in IGNORED_KEYS if item.get(key) is not None}


# an empty field counts as missing
Empty = Annotated[
    Any,
    AfterValidator(lambda value: value if value in (None, []) else reject("no such field")),
    WithJsonSchema({"enum": [None, []]}),
]


@with_config(strict=True)
class PromptMessage(IgnoredKeys, extra_items=Empty):
    role: Literal["system", "developer", "user"]
    content: Content
    name: NotRequired[str | None]


@with_config(strict=True)
class AssistantMessage(IgnoredKeys, extra_items=Empty):
    role: Literal["assistant"]
    content: NotRequired[Content | None]
    name: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(max_length=1024)] | None]


@with_config(strict=True)
class ToolMessage(IgnoredKeys, extra_items=Empty):
    role: Literal["tool"]
    content: Content
    name: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]


def normalize_messages(messages: list[Any]) -> list[Message]:
    """Convert messages to the format that chat templates read. InputError: a message is wrong."""
    for i, message in enumerate(messages):
        if message.get("content") is None and not message.get("tool_calls"):
            raise InputError(f"[{i}].content: expected a text or an array of parts, got nothing")
    functions = [call["function"] for m in messages for call in m.get("tool_calls") or ()]
    arguments = [function.get("arguments") for function in functions]
    check_json_texts(text for text in arguments if isinstance(text, str))
    try:
        messages = [_without_ignored(message) for _, message in parse_messages(messages, "")]
        calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
        json.dumps(calls, allow_nan=False, ensure_ascii=False).encode()  # they were JSON texts
    except InputError:
        raise
    except ValueError:
        reject("finite numbers and valid Unicode in the arguments of calls")
    except RecursionError:
        reject("arguments of calls that are not nested so deeply")
    return messages


InputMessages = Annotated[
    list[Annotated[PromptMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]],
    Field(min_length=1, max_length=MAX_MESSAGES),
]
Messages = Annotated[list[Message], ValidateAs(InputMessages, normalize_messages)]


class FunctionDefinition(TypedDict):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    # LangChain sends an empty description
    description: NotRequired[Annotated[str, Field(max_length=2**14)] | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


class Tool(IgnoredKeys):
    type: Literal["function"]
    function: FunctionDefinition


def unique_names(tools: list[Any]) -> list[Any]:
    names = set[str]()
    for i, tool in enumerate(tools):
        if (name := tool["function"]["name"]) in names:
            raise InputError(f"[{i}].function.name: expected a name of its own, got {name!r}")
        names.add(name)
    return tools


def _unchanged(tools: Any, handler: Any) -> Any:
    """Validate tools, but keep the order of their keys, since chat templates write them as JSON."""
    handler(tools)
    return [_without_ignored(tool) for tool in tools]


Tools = Annotated[
    list[Any],
    ValidateAs(Annotated[list[Tool], Field(max_length=MAX_TOOLS)], unique_names),
    WrapValidator(_unchanged),
]


class FunctionName(TypedDict):
    name: Annotated[str, Field(min_length=1, max_length=64)]


class NamedTool(TypedDict):
    type: NotRequired[Literal["function"] | None]
    function: FunctionName


class NamedSchema(TypedDict, total=False):
    name: Annotated[str, Field(min_length=1, max_length=64)] | None
    description: Annotated[str, Field(max_length=1024)] | None
    schema: JsonSchema | None
    strict: bool | None  # a grammar constrains answers to the schema either way


FormatType = Literal["text", "json_object", "json_schema"]


class ResponseFormat(TypedDict, total=False):
    type: FormatType | None
    json_schema: NamedSchema | None


def _free_names(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in TEMPLATE_NAMES or not name.isidentifier():
            reject("names that the server does not set itself")
    return variables


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_free_names)]
ToolMode = Literal["auto", "none", "required"]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolMode | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool = True
    store: bool = False  # the user consents that the conversation is stored
    conversation_id: Identifier | None = None

    echo: AlwaysFalse = False
    format_field: ClassVar[str] = "response_format"  # its name in errors
    _ignored_keys: tuple[str, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _note_ignored_keys(cls, body: Any, handler: Any) -> Self:
        request = handler(body)
        request._ignored_keys = tuple(sorted(ignored_keys(body["messages"], body.get("tools"))))
        return request

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        return *super().ignored_fields, *self._ignored_keys

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "expected with logprobs true")
        if self.conversation_id is not None and not self.store:
            raise field_error("conversation_id", "expected with store true")
        return self

    def _output_format(self) -> OutputFormat | None:
        """Return the format of the text, of the calls, or of either if a call is optional."""
        if not self.tools and self.tool_choice not in (None, "auto", "none"):
            raise field_error("tool_choice", "expected with tools")
        if self.tool_choice == "none" or not self.tools:
            self.tools = None
        output_format, response_format = super()._output_format(), self.response_format or {}
        field = self.format_field
        if (kind := response_format.get("type") or "text") != "text":
            schema = (response_format.get("json_schema") or {}).get("schema")
            if output_format is not None:
                name = output_format.param.partition(".")[0]
                raise field_error(name, f"expected this or {field}, got both")
            if kind == "json_schema" and schema is None:
                raise field_error(f"{field}.json_schema.schema", "expected a schema, got nothing")
            output_format = OutputFormat(kind, schema if kind == "json_schema" else None, field)
        calls = self._calls_format()
        if (
            self.tools is None
            or output_format is None
            or (calls is not None and calls.kind == "call")
        ):
            return calls or output_format
        if output_format.kind not in ("json_object", "json_schema"):
            raise field_error(
                output_format.param, "expected without tools, or a JSON schema with them"
            )
        parallel = self.parallel_tool_calls is not False
        return OutputFormat("calls_or", (self.tools, parallel, output_format), output_format.param)

    def _calls_format(self) -> OutputFormat | None:
        """Return the format of an answer that must be a call, or whose calls have constraints."""
        tools, choice = self.tools, self.tool_choice
        if tools is None:
            return None
        if choice in (None, "auto"):
            strict = any(tool["function"].get("strict") for tool in tools)
            parallel = self.parallel_tool_calls is not False
            if parallel and not strict:
                return None
            return OutputFormat(
                "calls", (tools, parallel), "tools" if strict else "parallel_tool_calls"
            )
        name = choice["function"]["name"] if isinstance(choice, dict) else None
        matching = [tool for tool in tools if name in (None, tool["function"]["name"])]
        if not matching:
            raise field_error(
                "tool_choice.function.name", f"expected one of the tools, got {name!r}"
            )
        return OutputFormat("call", matching, "tool_choice")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
