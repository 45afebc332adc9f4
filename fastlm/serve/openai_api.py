"""Requests in OpenAI's shapes: which fields there are, and what a body asks for.

The tables `CHAT`, `TEXT`, `EMBED` are the API. docs/serving.md says of each field what it does;
`UNSUPPORTED` names what OpenAI has and this server does not. Where a value asks for nothing
(``"parallel_tool_calls": true``), that value alone is accepted.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm.data.conversations import Message
from fastlm.decode.sampling import Sampling
from fastlm.serve.fields import (
    ApiError,
    Field,
    choice,
    flag,
    identifier,
    list_of,
    name,
    number,
    read_fields,
    schema_of,
    table,
    text,
    whole,
    wrong,
)
from fastlm.serve.messages import MESSAGES
from fastlm.serve.tools import TOOLS, check_tools

MOST_CHOICES = 16  # answers to one prompt
MOST_PROMPTS = 64  # of one request to /v1/completions
MOST_INPUTS = 256  # of one request to /v1/embeddings
MOST_TOP = 20  # OpenAI's limit of top_logprobs
IDS = whole(0, 2**31 - 1)
UNSUPPORTED = frozenset(
    "audio function_call functions metadata modalities prediction prompt_cache_key"
    " prompt_cache_retention reasoning_effort safety_identifier service_tier suffix verbosity"
    " web_search_options moderation dimensions context_management user".split()
)


@dataclass(frozen=True)
class Form:
    """The form that an answer must have. ``kind``: "json_object", "json_schema", "regex", "choice",
    "grammar" (Lark, as llguidance reads it), "call" (of one of some tools), "calls" (text with
    calls in it; the value is the tools and whether there may be several). ``param``: the field
    that asks for it.
    """

    kind: str
    value: Any
    param: str


@dataclass(frozen=True)
class Asked:
    """What requests to both endpoints ask for. ``logprobs`` as in `fastlm.serve.requests`."""

    model: str
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    max_new_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    ignore_eos: bool
    logprobs: int | None
    form: Form | None


@dataclass(frozen=True)
class ChatAsked(Asked):
    """``store``: the user consents that the conversation is kept, under ``conversation_id``."""

    messages: list[Message]
    tools: list[Any] | None
    variables: dict[str, Any]
    store: bool
    conversation_id: str | None


@dataclass(frozen=True)
class TextAsked(Asked):
    """``prompts``: texts, or token ids."""

    prompts: list[str | list[int]]
    echo: bool


@dataclass(frozen=True)
class EmbedAsked:
    model: str
    inputs: list[str | list[int]]
    base64: bool


def _bias(value: Any, name: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise wrong(name, "an object of at most 1024 token ids and biases", value)
    pairs = []
    for key, bias in value.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise wrong(name, "token ids as keys", key)
        pairs.append((int(key), number(-100, 100).read(bias, f"{name}.{key}")))
    return tuple(sorted(dict(pairs).items()))


BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": 1024,
}


def _prompts(value: Any, name: str) -> list[str | list[int]]:
    """A text, texts, token ids or lists of token ids."""
    several = value
    ids = isinstance(value, list) and value and type(value[0]) in (int, float)
    if isinstance(value, str) or ids:
        several = [value]
    if not isinstance(several, list) or not 1 <= len(several):
        raise wrong(name, "a text, token ids, or a list of them", value)
    found: list[str | list[int]] = []
    for i, prompt in enumerate(several):
        where = name if several is not value else f"{name}[{i}]"
        if isinstance(prompt, str):
            found.append(text(2**26).read(prompt, where))
        elif isinstance(prompt, list) and prompt:
            found.append([IDS.read(token, f"{where}[{j}]") for j, token in enumerate(prompt)])
        else:
            raise wrong(where, "a text or token ids", prompt)
    return found


ONE_PROMPT = (
    {"type": "string", "minLength": 1, "maxLength": 2**26},
    {"type": "array", "items": IDS.schema, "minItems": 1},
)
PROMPTS = {"anyOf": [*ONE_PROMPT, {"type": "array", "items": {"anyOf": ONE_PROMPT}, "minItems": 1}]}


def _schema(value: Any, name: str) -> Any:
    if not isinstance(value, dict | bool):
        raise wrong(name, "a JSON schema", value)
    return value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


TEMPLATE_NAMES = frozenset(
    "messages tools documents add_generation_prompt date bos_token eos_token pad_token unk_token"
    " self check".split()
)


def _variables(value: Any, name: str) -> dict[str, Any]:
    for key in _object(value, name):
        if key in TEMPLATE_NAMES or not key.isidentifier():
            raise wrong(name, "names that the server does not set itself", key)
    return value


def _temperature(value: Any, name: str) -> float:
    found = number(0, 2).read(value, name)
    if 0 < found < LEAST_TEMPERATURE:
        raise wrong(name, f"0 or a number from {LEAST_TEMPERATURE:g} to 2", value)
    return found


LEAST_TEMPERATURE = 1e-6  # of `Sampling`, but for 0
TEMPERATURE = Field(
    _temperature,
    {"anyOf": [{"const": 0}, {"type": "number", "minimum": LEAST_TEMPERATURE, "maximum": 2}]},
    1.0,
)
NAMED = {
    "type": choice("function"),
    "function": table({"name": text(64, required=True)}),
}


def _tool_choice(value: Any, name: str) -> str | dict[str, Any]:
    """A mode, or {"name"} of a function."""
    if isinstance(value, dict):
        function = read_fields(value, NAMED, name)["function"]
        if function is None:
            at = f"{name}.function"
            raise ApiError(f"{at}: wanted an object with a name, got none", param=at)
        return function
    return choice("auto", "none", "required").read(value, name)


RESPONSE_FORMAT = {
    "type": choice("text", "json_object", "json_schema", default="text"),
    "json_schema": table(
        {
            "name": text(64),
            "description": text(1024),
            "schema": Field(_schema, {"type": ["object", "boolean"]}),
            "strict": flag(True),  # answers keep to the schema either way
        }
    ),
}
STRUCTURED = {
    "json": Field(_schema, {"type": ["object", "boolean"]}),
    "regex": text(2**16),
    "choice": list_of(text(2**12), 1, 1024),
    "grammar": text(2**16),
}
SAMPLED: Mapping[str, Field] = {
    "model": name(256, required=True),
    "frequency_penalty": number(-2, 2, 0.0),
    "ignore_eos": flag(),
    "logit_bias": Field(_bias, BIAS, ()),
    "min_p": number(0, 1),
    "max_tokens": whole(1, 2**31),
    "n": whole(1, MOST_CHOICES, 1),
    "presence_penalty": number(-2, 2, 0.0),
    "repetition_penalty": number(0.001, 10, 1.0),
    "seed": whole(0, 2**63 - 1),
    "stop": list_of(text(256), 1, 16, one=True),
    "stop_token_ids": list_of(IDS, 1, 64),
    "stream": flag(),
    "stream_options": table({"include_usage": flag(), "continuous_usage_stats": flag()}),
    "structured_outputs": table(STRUCTURED),
    "temperature": TEMPERATURE,
    "top_k": whole(1, 2**31),
    "top_p": number(0, 1, above=True),
    "user": name(128),  # a label of OpenAI's clients
}
CHAT: Mapping[str, Field] = {
    **SAMPLED,
    "messages": MESSAGES,
    "max_completion_tokens": whole(1, 2**31),
    "logprobs": flag(),
    "top_logprobs": whole(0, MOST_TOP),
    "response_format": table(RESPONSE_FORMAT),
    "tools": Field(check_tools, TOOLS),
    "tool_choice": Field(
        _tool_choice, {"anyOf": [{"enum": ["auto", "none", "required"]}, schema_of(NAMED)]}
    ),
    "parallel_tool_calls": flag(True),
    "chat_template_kwargs": Field(_variables, {"type": "object"}),
    "store": flag(),
    "conversation_id": identifier(),
}
TEXT: Mapping[str, Field] = {
    **SAMPLED,
    "prompt": Field(_prompts, PROMPTS, required=True),
    "echo": flag(),
    "logprobs": whole(0, MOST_TOP),
    "best_of": choice(1),
}
EMBED: Mapping[str, Field] = {
    "model": name(256, required=True),
    "input": Field(_prompts, PROMPTS, required=True),
    "encoding_format": choice("float", "base64", default="float"),
}


def chat_asked(body: Any) -> ChatAsked:
    """What a body of /v1/chat/completions asks for. ApiError names the field."""
    given = _given(body, CHAT)
    messages, tools = given["messages"], given["tools"]
    if given["top_logprobs"] is not None and not given["logprobs"]:
        raise ApiError("top_logprobs: wanted with logprobs true", param="top_logprobs")
    if given["tool_choice"] is not None and tools is None:
        raise ApiError("tool_choice: wanted with tools", param="tool_choice")
    if not given["parallel_tool_calls"] and tools is None:
        raise ApiError("parallel_tool_calls: wanted with tools", param="parallel_tool_calls")
    if given["max_completion_tokens"] is not None:
        if given["max_tokens"] is not None:
            raise ApiError(
                "max_tokens: wanted this or max_completion_tokens, got both", param="max_tokens"
            )
        given["max_tokens"] = given["max_completion_tokens"]
    if given["tool_choice"] == "none":
        tools = None
    called = _called(given["tool_choice"], tools, given["parallel_tool_calls"])
    top = (given["top_logprobs"] or 0) if given["logprobs"] else None
    form = _response_format(given["response_format"])
    variables = given["chat_template_kwargs"] or {}
    asked = _asked(given, top, form)
    if tools is not None and asked["form"] is not None:
        raise ApiError(
            f"{asked['form'].param}: wanted without tools, whose calls would not have that form",
            param=asked["form"].param,
        )
    asked["form"] = asked["form"] or called
    _check_ends(asked)
    if given["conversation_id"] is not None and not given["store"]:
        raise ApiError("conversation_id: wanted with store true", param="conversation_id")
    return ChatAsked(
        **asked, messages=messages, tools=tools, variables=variables, store=given["store"],
        conversation_id=given["conversation_id"],
    )  # fmt: skip


def text_asked(body: Any) -> TextAsked:
    """What a body of /v1/completions asks for. ApiError names the field."""
    given = _given(body, TEXT)
    prompts = given["prompt"]
    if len(prompts) * given["n"] > MOST_PROMPTS:
        raise ApiError(
            f"prompt: wanted at most {MOST_PROMPTS} answers in one request,"
            f" got {len(prompts)} prompts with n {given['n']}",
            param="prompt",
        )
    if given["echo"] and given["logprobs"] is not None:
        raise ApiError("echo: not supported with logprobs", param="echo")
    asked = _asked(given, given["logprobs"], None)
    _check_ends(asked)
    return TextAsked(**asked, prompts=prompts, echo=given["echo"])


def embed_asked(body: Any) -> EmbedAsked:
    """What a body of /v1/embeddings asks for. ApiError names the field."""
    given = _given(body, EMBED)
    if len(given["input"]) > MOST_INPUTS:
        raise ApiError(
            f"input: wanted at most {MOST_INPUTS} texts, got {len(given['input'])}", param="input"
        )
    return EmbedAsked(given["model"], given["input"], given["encoding_format"] == "base64")


def _given(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    for key, value in body.items() if isinstance(body, dict) else ():
        if key in fields or (value is None and key in UNSUPPORTED):
            continue
        if key in UNSUPPORTED:
            raise ApiError(f"{key}: not supported by this server", param=key)
        near = difflib.get_close_matches(key[:80], fields, n=1, cutoff=0.6)
        hint = f"; the nearest known one is {near[0]!r}" if near else ""
        raise ApiError(f"{key:.80}: unknown field{hint}", param=key[:80])
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if key in fields}
    return read_fields(body, fields)


def _asked(given: dict[str, Any], top: int | None, form: Form | None) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    names += ("presence_penalty", "frequency_penalty", "logit_bias")
    if given["stream_options"] is not None and not given["stream"]:
        raise ApiError("stream_options: wanted with stream true", param="stream_options")
    options = given["stream_options"] or {"include_usage": False, "continuous_usage_stats": False}
    if options["continuous_usage_stats"] and not options["include_usage"]:
        raise ApiError(
            "stream_options.continuous_usage_stats: wanted with include_usage true",
            param="stream_options.continuous_usage_stats",
        )
    structured = _structured(given["structured_outputs"])
    if form is not None and structured is not None:
        raise ApiError(
            "structured_outputs: wanted this or response_format, got both",
            param="structured_outputs",
        )
    return {
        "model": given["model"],
        "n": given["n"],
        "stream": given["stream"],
        "include_usage": options["include_usage"],
        "continuous_usage": options["continuous_usage_stats"],
        "max_new_tokens": given["max_tokens"],
        "sampling": Sampling(**{name: given[name] for name in names}),
        "seed": given["seed"],
        "stop": given["stop"],
        "stop_ids": frozenset(given["stop_token_ids"]),
        "ignore_eos": given["ignore_eos"],
        "logprobs": top,
        "form": form or structured,
    }


def _check_ends(asked: dict[str, Any]) -> None:
    if asked["form"] is not None and asked["ignore_eos"]:
        raise ApiError(
            f"ignore_eos: wanted without {asked['form'].param}, whose answers end where the form"
            " does",
            param="ignore_eos",
        )


def _called(chosen: Any, tools: list[Any] | None, parallel: bool) -> Form | None:
    """The form of an answer that has to be a call, or whose calls have to keep to something."""
    if tools is None:
        return None
    if chosen in (None, "auto"):
        strict = any(tool["function"].get("strict") for tool in tools)
        if parallel and not strict:
            return None
        param = "tools" if strict else "parallel_tool_calls"
        return Form("calls", (tools, parallel), param)
    name = chosen["name"] if isinstance(chosen, dict) else None
    named = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not named:
        raise ApiError(
            f"tool_choice.function.name: wanted one of the tools, got {name!r}",
            param="tool_choice.function.name",
        )
    return Form("call", named, "tool_choice")


def _response_format(given: dict[str, Any] | None) -> Form | None:
    if given is None or given["type"] == "text":
        return None
    if given["type"] == "json_object":
        return Form("json_object", None, "response_format")
    schema = (given["json_schema"] or {}).get("schema")
    if schema is None:
        raise ApiError(
            "response_format.json_schema.schema: wanted a schema, got none",
            param="response_format.json_schema.schema",
        )
    return Form("json_schema", schema, "response_format")


def _structured(given: dict[str, Any] | None) -> Form | None:
    found = {key: value for key, value in (given or {}).items() if value not in (None, ())}
    if given is None:
        return None
    if len(found) != 1:
        raise ApiError(
            f"structured_outputs: wanted one of {', '.join(STRUCTURED)}, got {len(found)}",
            param="structured_outputs",
        )
    ((kind, value),) = found.items()
    return Form("json_schema" if kind == "json" else kind, value, f"structured_outputs.{kind}")
