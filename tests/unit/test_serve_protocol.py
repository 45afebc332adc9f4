"""Request bodies without a server: refusals name the field."""

import json

import pytest

from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.body import MAX_ERRORS, RequestBody, read_request
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
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
        ({"stream_options": {"x": 1}}, "stream_options.x: expected no such field, got 1"),
        ({"messages": [SAID, {**SAID, "a b": 1}]}, "messages[1].'a b': expected no such field"),
        ({"messages": [{**SAID, "role": "robot"}]}, "messages[0].role: expected one of 'system',"),
        ({"messages": [{"role": "user", "content": [SAID]}]}, "messages[0].content[0]: expected a"),
        ({"stop": 7}, "stop: expected a string or an array, got 7"),
        ({"model": "a\nb"}, "model: expected one printable line, got 'a\\nb'"),
        ({"temperature": 10**400}, "temperature: expected"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1: expected a text that matches"),
    ],
    ids=range(11),
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
