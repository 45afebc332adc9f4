"""Requests in OpenAI's shapes: which fields there are, and what a body asks for.

The tables `CHAT`, `TEXT`, `EMBED` are the API. docs/serving.md says of each field what it does;
`IGNORED` are fields that cannot change an answer, `UNSUPPORTED` names what OpenAI has and this
server does not. Where a value asks for nothing (``"tools": []``), it is accepted.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm.data.conversations import Message
from fastlm.inference.forms import Form
from fastlm.inference.sampling import Sampling
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
from fastlm.serve.forms import (
    GUIDED,
    RESPONSE_FORMAT,
    STRUCTURED,
    joined_form,
    response_form,
    structured_form,
    tools_form,
)
from fastlm.serve.messages import MESSAGES
from fastlm.serve.tools import TOOLS, check_tools

MOST_CHOICES = 16  # answers to one prompt
MOST_PROMPTS = 64  # of one request to /v1/completions
MOST_INPUTS = 2048  # of one request to /v1/embeddings: OpenAI's limit
MOST_TOP = 20  # OpenAI's limit of top_logprobs
IDS = whole(0, 2**31 - 1)
UNSUPPORTED = frozenset(
    "audio function_call functions suffix web_search_options moderation context_management".split()
)
# other names of a field
ALIASES = {"max_completion_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}


@dataclass(frozen=True)
class Asked:
    """What requests for answers ask for. ``logprobs`` as in `fastlm.inference.requests`;
    ``ignored``: fields that change nothing."""

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
    min_new_tokens: int
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class ChatAsked(Asked):
    """``store``: the user consents that the conversation is kept, under ``conversation_id``.
    ``parallel``: several calls are asked for (True) or refused (False). ``opens``: the template
    begins the answer."""

    messages: list[Message]
    tools: list[Any] | None
    parallel: bool | None
    variables: dict[str, Any]
    opens: bool
    store: bool
    conversation_id: str | None


@dataclass(frozen=True)
class TextAsked(Asked):
    """``prompts``: texts, or token ids. ``max_new_tokens`` may be 0: the prompts are scored."""

    prompts: list[str | list[int]]
    echo: bool


@dataclass(frozen=True)
class EmbedAsked:
    model: str
    inputs: list[str | list[int]]
    base64: bool
    dimensions: int | None
    ignored: tuple[str, ...]


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


def _inputs(value: Any, name: str, empty: bool = True) -> list[str | list[int]]:
    """A text, texts, token ids or lists of token ids. ``empty``: also an empty text."""
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
            found.append(text(2**26, empty=empty).read(prompt, where))
        elif isinstance(prompt, list) and prompt:
            found.append([IDS.read(token, f"{where}[{j}]") for j, token in enumerate(prompt)])
        else:
            raise wrong(where, "a text or token ids", prompt)
    return found


def _prompts(value: Any, name: str) -> list[str | list[int]]:
    return _inputs(value, name, empty=False)


def _prompts_schema(empty: bool) -> dict[str, Any]:
    one = (
        text(2**26, empty=empty).schema,
        {"type": "array", "items": IDS.schema, "minItems": 1},
    )
    return {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}, "minItems": 1}]}


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


def _top_k(value: Any, name: str) -> int | None:
    """None for -1 and 0, by which vLLM and llama.cpp switch it off."""
    found = whole(-1, 2**31).read(value, name)
    return found if found > 0 else None


OBJECT = Field(_object, {"type": "object"})
LABEL = name(512)
# What cannot change an answer: it is checked, and named in the log and in a header of the response.
# `reasoning_effort` is a variable of the chat templates that read it.
IGNORED: Mapping[str, Field] = {
    "cache_prompt": flag(True),  # of llama.cpp: prompts are cached in any case
    "metadata": OBJECT,
    "modalities": list_of(choice("text"), 1, 1),
    "prediction": OBJECT,  # would only make it faster
    "prompt_cache_key": LABEL,
    "prompt_cache_retention": LABEL,
    "reasoning_effort": LABEL,
    "safety_identifier": LABEL,
    "service_tier": LABEL,
    "user": LABEL,
    "verbosity": LABEL,
}
SAMPLED: Mapping[str, Field] = {
    **IGNORED,
    **GUIDED,
    "model": name(256, required=True),
    "frequency_penalty": number(-2, 2, 0.0),
    "ignore_eos": flag(),
    "logit_bias": Field(_bias, BIAS, ()),
    "min_p": number(0, 1),
    "min_tokens": whole(0, 2**31, 0),
    "max_tokens": whole(1, 2**31),
    "n": whole(1, MOST_CHOICES, 1),
    "presence_penalty": number(-2, 2, 0.0),
    "repetition_penalty": number(0.001, 10, 1.0),
    "repeat_penalty": number(0.001, 10),
    "seed": whole(0, 2**63 - 1),
    "stop": list_of(text(256), 0, 16, one=True),
    "stop_token_ids": list_of(IDS, 0, 64),
    "stream": flag(),
    "stream_options": table({"include_usage": flag(), "continuous_usage_stats": flag()}),
    "structured_outputs": table(STRUCTURED),
    "temperature": TEMPERATURE,
    "top_k": Field(_top_k, whole(-1, 2**31).schema),
    "top_p": number(0, 1, above=True),
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
    "parallel_tool_calls": flag(None),
    "chat_template_kwargs": Field(_variables, {"type": "object"}),
    "add_generation_prompt": flag(True),
    "store": flag(),
    "conversation_id": identifier(),
}
TEXT: Mapping[str, Field] = {
    **SAMPLED,
    "prompt": Field(_prompts, _prompts_schema(empty=False), required=True),
    "max_tokens": whole(0, 2**31),
    "echo": flag(),
    "logprobs": whole(0, MOST_TOP),
    "best_of": choice(1),
}
EMBED: Mapping[str, Field] = {
    "model": name(256, required=True),
    "input": Field(_inputs, _prompts_schema(empty=True), required=True),
    "encoding_format": choice("float", "base64", default="float"),
    "dimensions": whole(1, 2**20),
    "user": IGNORED["user"],
}


def chat_asked(body: Any) -> ChatAsked:
    """What a body of /v1/chat/completions asks for. ApiError names the field."""
    given = read_body(body, CHAT)
    if given["top_logprobs"] is not None and not given["logprobs"]:
        raise ApiError("top_logprobs: wanted with logprobs true", param="top_logprobs")
    if given["conversation_id"] is not None and not given["store"]:
        raise ApiError("conversation_id: wanted with store true", param="conversation_id")
    top = (given["top_logprobs"] or 0) if given["logprobs"] else None
    form = response_form(given["response_format"])
    return ChatAsked(**chat_fields(given, top, form))


def chat_fields(given: dict[str, Any], top: int | None, form: Form | None) -> dict[str, Any]:
    """The fields of a `ChatAsked` from a body that was read by `CHAT`: log-probabilities of the
    ``top`` tokens, and a ``form``."""
    tools, parallel, chosen = given["tools"], given["parallel_tool_calls"], given["tool_choice"]
    if tools is None and chosen not in (None, "auto", "none"):
        raise ApiError("tool_choice: wanted with tools", param="tool_choice")
    if chosen == "none":
        tools = None
    asked = _asked(given, top, form)
    called = tools_form(chosen, tools, parallel is not False)
    asked["form"] = joined_form(asked["form"], called, tools, parallel is not False)
    _check_ends(asked)
    variables = given["chat_template_kwargs"] or {}
    if given["reasoning_effort"] is not None:
        variables = {"reasoning_effort": given["reasoning_effort"], **variables}
    return {
        **asked, "messages": given["messages"], "tools": tools, "parallel": parallel,
        "variables": variables, "opens": given["add_generation_prompt"], "store": given["store"],
        "conversation_id": given["conversation_id"],
    }  # fmt: skip


def text_asked(body: Any) -> TextAsked:
    """What a body of /v1/completions asks for. ApiError names the field."""
    given = read_body(body, TEXT)
    prompts = given["prompt"]
    if len(prompts) * given["n"] > MOST_PROMPTS:
        raise ApiError(
            f"prompt: wanted at most {MOST_PROMPTS} answers in one request,"
            f" got {len(prompts)} prompts with n {given['n']}",
            param="prompt",
        )
    if given["max_tokens"] == 0 and not given["echo"]:
        raise ApiError("max_tokens: expected at least 1, or 0 with echo, got 0", param="max_tokens")
    asked = _asked(given, given["logprobs"], None)
    _check_ends(asked)
    return TextAsked(**asked, prompts=prompts, echo=given["echo"])


def embed_asked(body: Any) -> EmbedAsked:
    """What a body of /v1/embeddings asks for. ApiError names the field."""
    given = read_body(body, EMBED)
    if len(given["input"]) > MOST_INPUTS:
        raise ApiError(
            f"input: wanted at most {MOST_INPUTS} texts, got {len(given['input'])}", param="input"
        )
    return EmbedAsked(
        given["model"], given["input"], given["encoding_format"] == "base64", given["dimensions"],
        _ignored(given),
    )  # fmt: skip


def _ignored(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that were given and change nothing. A flag's default counts as not given."""
    return tuple(
        name for name, field in IGNORED.items() if given.get(name) not in (None, field.default)
    )


def read_body(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a body, as `read_fields`; of two names of a field, the known one."""
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
    given = read_fields(body, fields)
    for alias, known in ALIASES.items():
        if given.get(alias) is not None:
            if body.get(known) is not None:
                raise ApiError(f"{known}: wanted this or {alias}, got both", param=known)
            given[known] = given[alias]
    return given


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
    structured = structured_form(given)
    if form is not None and structured is not None:
        param = structured.param.partition(".")[0]
        raise ApiError(f"{param}: wanted this or {form.param}, got both", param=param)
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
        "min_new_tokens": given["min_tokens"],
        "ignored": _ignored(given),
    }


def _check_ends(asked: dict[str, Any]) -> None:
    """ApiError: a field says where the answer ends, and so does its form."""
    if asked["form"] is None:
        return
    ends = {"ignore_eos": asked["ignore_eos"], "min_tokens": asked["min_new_tokens"]}
    for field, given in ends.items():
        if given:
            raise ApiError(
                f"{field}: wanted without {asked['form'].param}, whose answers end where the form"
                " does",
                param=field,
            )
