"""Tool calls in answers: what is recognised, piece by piece, and what stays text."""

import json
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_app import ask, script, serving, tiny_model

from fastlm.serve.grammar import Grammars
from fastlm.serve.openai_api import Form
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


# a strict tool, and one whose arguments are any object
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
STRICT = [
    {"type": "function", "function": {"name": "forecast", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now", "parameters": SCHEMA}},
]
GOOD = '{"name": "forecast", "arguments": {"unit": "C", "days": 3}}'
CALLED = f"<tool_call>{GOOD}</tool_call>"
NOW = '<tool_call>\n{"name": "now", "arguments": {"any": [1]}}\n</tool_call>'


@pytest.fixture(scope="module")
def grammars():
    model, tokenizer = tiny_model()
    return Grammars(tokenizer, model.config)


@pytest.mark.parametrize(
    ("text", "several", "one"),  # whether it may be an answer, with several calls or one at most
    [
        ("", True, True),
        ("a < b <tool_cal {", True, True),
        ('{"x": 1}', True, True),  # text: it is no call
        (CALLED, True, True),
        (f"Let me see.\n{CALLED}", True, True),
        (NOW, True, True),
        (f"{CALLED} Well.", True, False),
        (f"{NOW}{CALLED}\n{CALLED}", True, False),
        (f"<tool_call>[{GOOD}, {GOOD}]</tool_call>", True, False),
        (CALLED.replace('"C"', '"K"'), False, False),
        (CALLED.replace("3", "10"), False, False),
        (CALLED.replace(', "days": 3', ""), False, False),
        (CALLED.replace("forecast", "other"), False, False),
        (f"{CALLED}<tool_call>no", False, False),
        ("<tool_call>no</tool_call>", False, False),
        ("Well <tool_call>", False, False),  # a call that has no end
    ],
)
def test_strict_calls_have_a_grammar(grammars, text, several, one):
    for parallel, good in ((True, several), (False, one)):
        state = grammars.constraint(Form("calls", (STRICT, parallel), "tools"))()
        for token in grammars.tokenizer.encode(text):
            if not state.mask()[token]:
                assert not good
                break
            state.accept(token)
        else:
            assert state.mask()[grammars.ends].all() == good
            if good:  # what the grammar lets pass as a call is read as one
                said, calls = read(text, names=("forecast", "now"))
                assert len(calls) == text.count('"name"')
                assert not calls or "tool_call" not in said


@pytest.mark.parametrize("parallel", (True, False))
def test_strict_calls_of_a_model(parallel):
    """It begins a call, and the grammar brings it to its end."""
    model, tokenizer = tiny_model(1024)
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": STRICT,
        "parallel_tool_calls": parallel, "max_tokens": 300, "temperature": 1,
    }  # fmt: skip
    begins = r'Well\. <tool_call>\{"name": "forecast", "arguments": (.|\n)*'
    with serving(model, tokenizer) as (url, server):
        submit = server.served.engine.submit

        def begin(request, listener):
            start = server.served.grammars.constraint(Form("regex", begins, "regex"))
            both = lambda: Both(request.constraint(), start())  # noqa: E731
            return submit(replace(request, constraint=both), listener)

        server.served.engine.submit = begin
        for seed in range(4):
            (choice,) = ask(url, {**body, "seed": seed}).json()["choices"]
            call = choice["message"]["tool_calls"][0]["function"]
            jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
            assert choice["message"]["content"].startswith("Well. ")
            if not parallel:
                assert choice["message"]["content"] == "Well. "
                assert choice["finish_reason"] == "tool_calls"


class Both:
    """A `Constraint` that is two."""

    def __init__(self, *parts):
        self.parts = parts

    def mask(self):
        return self.parts[0].mask() & self.parts[1].mask()

    def accept(self, token):
        for part in self.parts:
            part.accept(token)


def test_models_that_write_calls_otherwise_have_no_strict_ones():
    model, tokenizer = tiny_model()
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_call>", "call>")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60}
    with serving(model, tokenizer) as (url, _):
        for fields, param in (
            ({"tools": STRICT}, "tools"),
            ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ):
            error = ask(url, {**body, **fields}).json()["error"]
            assert error["param"] == param and "tool_choice 'required'" in error["message"]
            for choice in ("required", "none"):
                assert ask(url, {**body, **fields, "tool_choice": choice}).status_code == 200
        assert ask(url, {**body, "tools": TOOLS}).status_code == 200
