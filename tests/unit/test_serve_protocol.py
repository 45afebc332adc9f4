"""Request bodies without a server: refusals name the field."""

import json

import pytest

from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.body import MAX_ERRORS, RequestBody, read_request
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest
from fastlm.serve.protocol.foreign_fields import NEUTRAL, RENAMED, UNSUPPORTED
from fastlm.serve.protocol.responses_api import ResponsesRequest

SAID = {"role": "assistant", "content": "x"}


def refusal(data, model: type[RequestBody] = ChatCompletionRequest):
    with pytest.raises(ApiError) as refused:
        read_request(data, model)
    assert refused.value.status == 400 and "\n" not in str(refused.value)
    return refused.value.param, str(refused.value)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 10**5, "200 levels"), ('{"a":' * 202 + "1" + "}" * 202, "200 levels"),
        ('{"a": NaN}', "JSON"), ('{"a": -Infinity}', "JSON"), ('{"a": 1e999}', "finite"),
        ('{"seed": ' + "9" * 5000 + "}", "number out of range"), ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": {"b": 1, "b": 2}}', "b: expected once"), ("\ufeff{}", "JSON"), ("", "JSON"),
        ("[]", "an object"),
    ],
    ids=range(11),
)  # fmt: skip
def test_hostile_json_is_refused(text, reason):
    assert reason in refusal(text.encode())[1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temprature": 1, "seed": "x"},
         "temprature: unknown field; the nearest valid one is 'temperature'"),
        ({"quality": None}, "quality: unknown field"), ({"audio": {}}, "audio: not supported by"),
        ({"n_predict": 3}, "n_predict: not supported by this server; it has 'max_tokens' instead"),
        ({"num_ctx": 64}, "num_ctx: not supported by this server: its option --max-model-len sets"),
        ({"stop_regex": "a"}, "stop_regex: unknown field"),  # not store
        ({"echo": True}, "echo: expected False, got True"),
        ({"best_of": 2}, "best_of: expected 1 or n, since all answers are returned, got 2"),
        ({"priority": 1}, "priority: expected 0, since the queues of clients take turns, got 1"),
        ({"stream_options": {"x": 1}}, "stream_options.x: expected no such field, got 1"),
        ({"messages": [SAID, {**SAID, "a b": 1}]}, "messages[1].'a b': expected no such field"),
        ({"messages": [{**SAID, "role": "robot"}]}, "messages[0].role: expected one of 'system',"),
        ({"messages": [{"role": "user", "content": [SAID]}]}, "messages[0].content[0]: expected a"),
        ({"stop": 7}, "stop: expected a string or an array, got 7"),
        ({"model": "a\nb"}, "model: expected one printable line, got 'a\\nb'"),
        ({"temperature": 10**400}, "temperature: expected"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1: expected a text that matches"),
    ],
    ids=range(17),
)  # fmt: skip
def test_a_refusal_names_the_field_and_what_it_expects(fields, message):
    param, text = refusal(json.dumps({"model": "m", "messages": [SAID], **fields}).encode())
    assert text.startswith(message) and text.startswith(f"{param}: ")


def test_a_body_of_many_errors_is_refused_at_once():
    names = {f"x{i}": 1 for i in range(MAX_ERRORS + 1)}
    body = {"model": "m", "messages": [SAID], "structured_outputs": names}
    assert f"got {MAX_ERRORS + 1} that are not" in refusal(json.dumps(body).encode())[1]


@pytest.mark.parametrize("names, param", [("ff", "tools[1].name"), ("fg", "tool_choice.name")])
def test_errors_about_a_chat_name_the_fields_of_responses(names, param):
    tools = [{"type": "function", "name": name} for name in names]
    body = {"model": "m", "input": "x", "tools": tools, "tool_choice": {"name": "h"}}
    assert refusal(json.dumps(body).encode(), ResponsesRequest)[0] == param


REQUESTS: dict[type[RequestBody], dict] = {
    ChatCompletionRequest: {"messages": [SAID]}, CompletionRequest: {"prompt": "x"},
    ResponsesRequest: {"input": "x"},
}  # fmt: skip


@pytest.mark.parametrize("model", REQUESTS)
def test_values_of_other_servers_that_change_nothing(model):
    """They are accepted and named as ignored; other values are refused with the reason."""
    body = {"model": "m", **REQUESTS[model]}
    defaults = {name: value for name, (value, _) in NEUTRAL.items()}
    request = read_request(json.dumps(body | defaults).encode(), model)
    chat = request.chat if isinstance(request, ResponsesRequest) else request
    assert chat.ignored_fields == tuple(defaults)
    assert read_request(json.dumps(body | dict.fromkeys(defaults)).encode(), model)
    for name, (value, reason) in NEUTRAL.items():
        for other in (7, str(value), [value]):
            param, text = refusal(json.dumps(body | {name: other}).encode(), model)
            assert param == name and f"{json.dumps(value)}, since {reason}, got" in text


@pytest.mark.parametrize("model", REQUESTS)
def test_fields_of_other_servers_that_have_another_name_or_none(model):
    body = {"model": "m", **REQUESTS[model]}
    fields = model.model_fields
    for name in {*RENAMED, *UNSUPPORTED} - set(fields):
        text = refusal(json.dumps(body | {name: {}}).encode(), model)[1]
        replacements = [new for new in RENAMED.get(name, "").split() if f"'{new}'" in text]
        assert all(new.partition(".")[0] in fields for new in replacements)
        if model is ChatCompletionRequest:
            assert replacements or text.endswith(UNSUPPORTED[name]), text
        if replacements or name in UNSUPPORTED:
            assert read_request(json.dumps(body | {name: None}).encode(), model)


def test_keys_of_messages_that_change_nothing():
    """Anthropic's cache_control, and what litellm adds to the answers of others."""
    mark, more = {"type": "ephemeral"}, {"thought_signature": "x"}
    parts = [{"type": "text", "text": "x", "cache_control": mark}]
    call = {"function": {"name": "f", "provider_specific_fields": more}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": "f"}, "cache_control": mark}
    for message, name in (
        ({"role": "user", "content": parts}, "cache_control"),
        ({**SAID, "cache_control": mark}, "cache_control"),
        ({**SAID, "provider_specific_fields": more}, "provider_specific_fields"),
        (calls, "provider_specific_fields"),
    ):  # fmt: skip
        body = {"model": "m", "messages": [message]}
        request = read_request(json.dumps(body).encode(), ChatCompletionRequest)
        assert request.ignored_fields == (name,)
        assert name not in json.dumps(request.messages)
    body = {"model": "m", "messages": [SAID], "tools": [tool]}
    request = read_request(json.dumps(body).encode(), ChatCompletionRequest)
    assert request.ignored_fields == ("cache_control",)
    assert request.tools == [{"type": "function", "function": {"name": "f"}}]
    body["messages"] = [{**SAID, "cache_control": 7}]
    assert refusal(json.dumps(body).encode())[0] == "messages[0].cache_control"
