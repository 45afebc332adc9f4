"""Tool calls in answers: what is recognised, piece by piece, and what stays text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_app import ask, script, serving, tiny_model

from fastlm.serve.tools import ToolText

ADD = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "now")]


def read(text, size=3, names=("add", "now")):
    tools = ToolText(names)
    said = "".join(tools.push(text[i : i + size]) for i in range(0, len(text), size))
    return said + tools.end(), tools.calls


@pytest.mark.parametrize("size", (1, 3, 1000))
@pytest.mark.parametrize(
    "text, said, names",
    [
        ("Hello <b>", "Hello <b>", []),
        (f"<tool_call>\n{json.dumps(ADD)}\n</tool_call>", "", ["add"]),
        (f"Well.\n<tool_call>{json.dumps(ADD)}", "Well.\n", ["add"]),  # without its end
        (f"<tool_call>{json.dumps([ADD, {'name': 'now'}])}</tool_call>", "", ["add", "now"]),
        (f"<tool_call>{json.dumps(ADD)}</tool_call>\n<tool_call>{json.dumps(ADD)}</tool_call>", "",
         ["add", "add"]),
        ('{"name": "add", "parameters": {"a": 1}}', "", ["add"]),
        (f" [{json.dumps(ADD)}]", "", ["add"]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ("{ not JSON", "{ not JSON", []),
        ("<tool_call>{</tool_call> then", "<tool_call>{</tool_call> then", []),
        ("a < b <tool", "a < b <tool", []),
        ("[]", "[]", []),
        (f"<tool_call>{json.dumps(ADD)}</tool_call>\nI ask it.", "\nI ask it.", ["add"]),
        (f"[I think] <tool_call>{json.dumps(ADD)}</tool_call>", "[I think] ", ["add"]),
        (f"<tool_call>no</tool_call><tool_call>{json.dumps(ADD)}", "<tool_call>no</tool_call>",
         ["add"]),
        ('{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": NaN}}',
         []),
    ],
)  # fmt: skip
def test_calls_are_recognised(text, said, names, size):
    have, calls = read(text, size)
    assert (have, [call["function"]["name"] for call in calls]) == (said, names)
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function" and isinstance(
            json.loads(call["function"]["arguments"]), dict
        )


@pytest.mark.parametrize("value", ("a</tool_call>b", "<tool_call>", "\ud800", "é"))
def test_arguments_stay_as_they_are(value):
    call = {"name": "add", "arguments": {"a": value}}
    for text in (json.dumps(call), f"<tool_call>{json.dumps(call)}</tool_call>"):
        said, (found,) = read(text)
        assert said == "" and json.loads(found["function"]["arguments"]) == {"a": value}
        found["function"]["arguments"].encode()
    bare = json.dumps({"name": "add", "arguments": "\ud800"})
    assert read(bare) == (bare, [])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<", "{", "}", '"', "x", "[", " "]))
)
def test_other_text_is_passed_on_unchanged(parts):
    text = "".join(parts)
    assert read(text, 2) == (text, [])


def test_over_http():
    model, tokenizer = tiny_model()
    text = f"Let me see. <tool_call>{json.dumps(ADD)}</tool_call>"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    with serving(model, tokenizer) as (url, server):
        script(server, text)
        (choice,) = ask(url, body).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["message"]["content"] == "Let me see. "
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
        assert choice["finish_reason"] == "tool_calls"
        lines = ask(url, {**body, "stream": True}).text.split("\n\n")
        deltas = [json.loads(line[6:])["choices"][0] for line in lines if line[6:7] == "{"]
        assert "".join(d["delta"].get("content", "") for d in deltas) == "Let me see. "
        (streamed,) = (d["delta"]["tool_calls"] for d in deltas if "tool_calls" in d["delta"])
        assert streamed[0]["index"] == 0 and streamed[0]["function"] == call["function"]
        assert deltas[-1]["finish_reason"] == "tool_calls"
        del body["tools"]  # nobody asked for calls
        assert ask(url, body).json()["choices"][0]["message"]["content"] == text
