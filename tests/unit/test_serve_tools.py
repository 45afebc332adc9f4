"""The parsers of tool calls: calls that they recognise, piece by piece, and text."""

import json
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_app import ask, script, serve_model, tiny_model

from fastlm.inference.output_format import GenericTools, OutputFormat
from fastlm.inference.structured_output import GrammarCompiler
from fastlm.inference.tool_parser import CallsOrTextParser, ToolParser
from fastlm.serve.generic_tools import GenericToolParser
from fastlm.tokenizer.chat_template import CHATML

ADD = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "now")]


def read(text, size=3, names=("add", "now")):
    tools = ToolParser(names)
    content = "".join(tools.push(text[i : i + size]) for i in range(0, len(text), size))
    return content + tools.end(), tools.tool_calls


@pytest.mark.parametrize("size", (1, 3, 1000))
@pytest.mark.parametrize(
    "text, expected, names",
    [
        ("Hello <b>", "Hello <b>", []),
        (f"<tool_call>\n{json.dumps(ADD)}\n</tool_call>", "", ["add"]),
        (f"Well.\n<tool_call>{json.dumps(ADD)}", "Well.\n", ["add"]),  # without an end
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
def test_calls_are_recognised(text, expected, names, size):
    content, calls = read(text, size)
    assert (content, [call["function"]["name"] for call in calls]) == (expected, names)
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function" and isinstance(
            json.loads(call["function"]["arguments"]), dict
        )


@pytest.mark.parametrize("value", ("a</tool_call>b", "<tool_call>", "\ud800", "é"))
def test_arguments_stay_as_they_are(value):
    call = {"name": "add", "arguments": {"a": value}}
    for text in (json.dumps(call), f"<tool_call>{json.dumps(call)}</tool_call>"):
        content, (parsed_call,) = read(text)
        assert content == "" and json.loads(parsed_call["function"]["arguments"]) == {"a": value}
        parsed_call["function"]["arguments"].encode()
    bare = json.dumps({"name": "add", "arguments": "\ud800"})
    assert read(bare) == (bare, [])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<", "{", "}", '"', "x", "[", " "]))
)
def test_other_text_is_unchanged(parts):
    text = "".join(parts)
    assert read(text, 2) == (text, [])


def test_over_http():
    model, tokenizer = tiny_model()
    text = f"Let me see. <tool_call>{json.dumps(ADD)}</tool_call>"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    with serve_model(model, tokenizer) as (url, server):
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
        del body["tools"]  # the request has no tools
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
    return GrammarCompiler(tokenizer, model.config)


@pytest.mark.parametrize(
    (
        "text",
        "with_parallel",
        "without_parallel",
    ),  # valid with parallel calls, and with one call at most
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
def test_strict_calls_have_a_grammar(grammars, text, with_parallel, without_parallel):
    for parallel, good in ((True, with_parallel), (False, without_parallel)):
        state = grammars.constraint(OutputFormat("calls", (STRICT, parallel), "tools"))()
        for token in grammars.tokenizer.encode(text):
            if not state.mask()[token]:
                assert not good
                break
            state.accept(token)
        else:
            assert state.mask()[grammars.stop_ids].all() == good
            if good:  # the parser recognises every call that the grammar allows
                content, calls = read(text, names=("forecast", "now"))
                assert len(calls) == text.count('"name"')
                assert not calls or "tool_call" not in content


def accepts(grammars, form, text):
    """Return whether a text matches a form."""
    state = grammars.constraint(form)()
    for token in grammars.tokenizer.encode(text):
        if not state.mask()[token]:
            return False
        state.accept(token)
    return bool(state.mask()[grammars.stop_ids].all())


JSON = OutputFormat("json_schema", SCHEMA, "response_format")
ONE = '{"unit": "C", "days": 3}'
TOOL_CALL = f'<tool_call>\n{{"name": "now", "arguments": {ONE}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "with_parallel", "without_parallel"),
    [
        (ONE, True, True),
        (TOOL_CALL, True, True),
        (f"{TOOL_CALL}\n{TOOL_CALL}", True, False),
        ("Well.", False, False),
        (f"{ONE} Well.", False, False),
        (TOOL_CALL.replace("now", "other"), False, False),
        (TOOL_CALL.replace('"C"', '"K"'), False, False),
        ('{"unit": "K", "days": 3}', False, False),
    ],
)
def test_calls_or_a_form(grammars, text, with_parallel, without_parallel):
    for parallel, good in ((True, with_parallel), (False, without_parallel)):
        form = OutputFormat("calls_or", (STRICT, parallel, JSON), "response_format")
        assert accepts(grammars, form, text) == good


def parse_with(parser, text, size=3):
    content = "".join(parser.push(text[i : i + size]) for i in range(0, len(text), size))
    return content + parser.end(), [call["function"] for call in parser.tool_calls]


@pytest.mark.parametrize("size", (1, 5, 1000))
def test_an_answer_that_is_calls_or_text(size):
    names = ("forecast", "now")
    now = {"name": "now", "arguments": ONE}
    for text, expected in (
        (f"\n{TOOL_CALL}\n{TOOL_CALL}", ("", [now, now])),
        (f'{{"a": "{CALLED}"}}', (f'{{"a": "{CALLED}"}}', [])),  # a text that quotes a call
        ("<tool", ("<tool", [])),
        ("", ("", [])),
    ):
        assert parse_with(CallsOrTextParser(names), text, size) == expected


GENERIC_CALLS = '{"tool_calls": [{"name": "forecast", "arguments": {"unit": "C", "days": 3}}]}'
TWO = GENERIC_CALLS.replace("]", ', {"name": "now","arguments":{"unit": "F", "days": 0}} ]')


@pytest.mark.parametrize(
    ("text", "free", "required"),  # valid if a call is optional, and if it is required
    [
        (GENERIC_CALLS, True, True),
        ('{"response": "Sun, é \\"and\\" rain"}', True, False),
        (GENERIC_CALLS.replace('"C"', '"K"'), False, False),
        (GENERIC_CALLS.replace("forecast", "other"), False, False),
        ('{"tool_calls": []}', False, False),
        ("Sun", False, False),
        (TWO, False, False),
    ],
)
def test_generic_answers_have_a_grammar(grammars, text, free, required):
    for must, good in ((False, free), (True, required)):
        form = OutputFormat(
            "generic", GenericTools(STRICT, False, must, {"type": "string"}), "tools"
        )
        assert accepts(grammars, form, text) == good
    several = OutputFormat("generic", GenericTools(STRICT, True, False, SCHEMA), "tools")
    assert accepts(grammars, several, text) == (good or text == TWO)
    assert accepts(grammars, several, '{"response": {"unit": "C", "days": 3}}')


@pytest.mark.parametrize("size", (1, 4, 1000))
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' { "response" : "Sun"}', "Sun"),
        ('{"response": "a\\n\\"b\\" \\\\ \\u00e9\\ud83d\\ude00 é"}', 'a\n"b" \\ é😀 é'),
        ('{"response": "half \\ud83d end"}', "half � end"),
        ('{"response": "cut \\ud83d', "cut "),
        ('{"response": "cut \\', "cut "),
        ('{"response": {"unit": "C"}}', '{"unit": "C"}'),
        ('{"tool_calls": [{"name": "oth', '{"tool_calls": [{"name": "oth'),
        ("Sun", "Sun"),
        (GENERIC_CALLS, ""),
    ],
)
def test_generic_answers_are_parsed(text, expected, size):
    content, calls = parse_with(GenericToolParser(("forecast", "now")), text, size)
    assert content == expected
    assert calls == ([{"name": "forecast", "arguments": ONE}] if text == GENERIC_CALLS else [])


def test_generic_responses_stream():
    parser = GenericToolParser(("now",))
    pieces = ('{"respon', 'se": "Su', "n ", "\\u00", 'e9"', "}")
    assert list(map(parser.push, pieces)) == ["", "Su", "n ", "", "é", ""]


def test_tools_of_a_model_whose_template_has_none():
    """As in llama.cpp, the system message has the tools, and the answer is JSON."""
    model, tokenizer = tiny_model(2048)
    tokenizer.chat_template = CHATML
    user = {"role": "user", "content": "Hi"}
    body = {"model": "tiny", "messages": [user], "tools": STRICT, "max_tokens": 60}
    with serve_model(model, tokenizer) as (url, server):
        requests, submit = [], server.served_model.engine.submit
        server.served_model.engine.submit = lambda *a: (requests.append(a[0]), submit(*a))[1]

        def prompt(**fields):
            response = ask(url, {**body, "max_tokens": 1, **fields})
            assert response.status_code == 200, response.text
            return tokenizer.decode(requests[-1].prompt, special=True)

        assert '"name": "forecast"' in (text := prompt()) and '"response"' in text
        assert text.startswith("<|im_start|>system\n") and requests[-1].constraint is not None
        talk = [
            {"role": "system", "content": "Be kind"}, user,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ONE}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "7"}, user,
        ]  # fmt: skip
        text = prompt(messages=talk)
        assert text.count("<|im_start|>system") == 1 and "Be kind<|im_end|>" in text
        assert '{"tool_calls": [{"name": "now", "arguments": {"unit": "C", "days": 3}}]}' in text
        assert '{"tool_response": {"tool_call_id": "c1", "content": "7"}}' in text
        assert '"7"' in prompt(messages=talk, tools=None)  # earlier calls, and no tools now
        tool_choice = {"type": "function", "function": {"name": "now"}}
        assert '"forecast"' not in prompt(tool_choice=tool_choice)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        for seed in range(3):
            fields = {"tool_choice": "required", "seed": seed, "max_tokens": 200}
            (choice,) = ask(url, {**body, **fields}).json()["choices"]
            (call,) = choice["message"]["tool_calls"]
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
            assert choice["finish_reason"] == "tool_calls"
            fields = {"response_format": form, "seed": seed, "max_tokens": 300}
            (choice,) = ask(url, {**body, **fields}).json()["choices"]
            calls = choice["message"].get("tool_calls", ())
            for text in [call["function"]["arguments"] for call in calls] or [
                choice["message"]["content"]
            ]:
                jsonschema.validate(json.loads(text), SCHEMA)
        error = ask(url, {**body, "ignore_eos": True}).json()["error"]
        assert error["param"] == "ignore_eos"
        script(server, GENERIC_CALLS, '{"response": "Sun"}')
        events = ask(url, {**body, "stream": True}).text
        assert '"tool_calls":[{"index":0' in events and '"finish_reason":"tool_calls"' in events
        assert ask(url, body).json()["choices"][0]["message"]["content"] == "Sun"


def test_response_format_with_tools():
    model, tokenizer = tiny_model(1024)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": STRICT,
        "max_tokens": 200, "response_format": form,
    }  # fmt: skip
    with serve_model(model, tokenizer) as (url, server):
        (choice,) = ask(url, {**body, "tool_choice": "required"}).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        for fields, param in (
            ({"response_format": None, "structured_outputs": {"regex": "a"}},
             "structured_outputs.regex"),
            ({"ignore_eos": True}, "ignore_eos"),
        ):  # fmt: skip
            assert ask(url, {**body, **fields}).json()["error"]["param"] == param
        script(server, ONE, TOOL_CALL)
        (choice,) = ask(url, body).json()["choices"]
        assert choice["message"]["content"] == ONE and "tool_calls" not in choice["message"]
        (choice,) = ask(url, body).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": ONE}


@pytest.mark.parametrize("parallel", (True, False))
def test_a_grammar_completes_a_strict_call(parallel):
    """The model begins a call, and the grammar completes it."""
    model, tokenizer = tiny_model(1024)
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": STRICT,
        "parallel_tool_calls": parallel, "max_tokens": 300, "temperature": 1,
    }  # fmt: skip
    begins = r'Well\. <tool_call>\{"name": "forecast", "arguments": (.|\n)*'
    with serve_model(model, tokenizer) as (url, server):
        submit = server.served_model.engine.submit

        def begin(request, listener):
            start = server.served_model.grammar_compiler.constraint(
                OutputFormat("regex", begins, "regex")
            )
            both = lambda: Both(request.constraint(), start())  # noqa: E731
            return submit(replace(request, constraint=both), listener)

        server.served_model.engine.submit = begin
        for seed in range(4):
            (choice,) = ask(url, {**body, "seed": seed}).json()["choices"]
            call = choice["message"]["tool_calls"][0]["function"]
            jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
            assert choice["message"]["content"].startswith("Well. ")
            if not parallel:
                assert choice["message"]["content"] == "Well. "
                assert choice["finish_reason"] == "tool_calls"


class Both:
    """Combines two constraints."""

    def __init__(self, *parts):
        self.parts = parts

    def mask(self):
        return self.parts[0].mask() & self.parts[1].mask()

    def accept(self, token):
        for part in self.parts:
            part.accept(token)


def test_strict_calls_need_the_tool_call_format():
    model, tokenizer = tiny_model()
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_call>", "call>")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60}
    with serve_model(model, tokenizer) as (url, _):
        for fields, param in (
            ({"tools": STRICT}, "tools"),
            ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ):
            error = ask(url, {**body, **fields}).json()["error"]
            assert error["param"] == param and "tool_choice 'required'" in error["message"]
            for choice in ("required", "none"):
                assert ask(url, {**body, **fields, "tool_choice": choice}).status_code == 200
        assert ask(url, {**body, "tools": TOOLS}).status_code == 200
