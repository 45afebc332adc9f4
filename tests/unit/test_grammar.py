"""Which answers a format allows, and which formats are refused before an answer begins."""

import json
import sys

import pytest
from serve_app import tiny_model

from fastlm.inference import structured_output as grammar
from fastlm.inference.json_schemas import close_objects
from fastlm.inference.output_format import GenericTools, OutputFormat
from fastlm.inference.requests import Piece
from fastlm.inference.structured_output import MAX_DIGITS, GrammarCompiler, OutputFormatError
from fastlm.serve.completion_response import generation_error


@pytest.fixture(scope="module")
def compiler():
    model, tokenizer = tiny_model()
    return GrammarCompiler(tokenizer, model.config)


def schema_format(schema):
    return OutputFormat("json_schema", schema, "response_format")


def accepts(compiler, output_format, text):
    """Return whether a text may be an answer."""
    state = compiler.constraint(output_format)()
    for token in compiler.tokenizer.encode(text):
        if not state.mask()[token]:
            return False
        state.accept(token)
    return bool(state.mask()[compiler.stop_ids].all())


def calls(parameters, arguments):
    """Yield formats in which a function may be called, each with a call of these arguments."""
    tool = {"type": "function", "function": {"name": "f"}}
    if parameters is not None:
        tool["function"]["parameters"] = parameters
    called = f'{{"name": "f", "arguments": {arguments}}}'
    text = f"<tool_call>\n{called}\n</tool_call>"
    yield OutputFormat("call", [tool], "tool_choice"), text
    yield OutputFormat("calls_or", ([tool], True, schema_format(AB)), "response_format"), text
    generic = OutputFormat(
        "generic", GenericTools([tool], False, False, {"type": "string"}), "tools"
    )
    yield generic, f'{{"tool_calls": [{called}]}}'


TOOL = {"type": "function", "function": {"name": "f"}}


def formats(schema, text):
    """Yield formats that hold an answer to a schema, each with an answer."""
    yield schema_format(schema), text
    yield OutputFormat("calls_or", ([TOOL], True, schema_format(schema)), "response_format"), text
    generic = OutputFormat("generic", GenericTools([TOOL], False, False, schema), "response_format")
    yield generic, f'{{"response": {text}}}'


A, B = ({"type": "integer", "maximum": 9, "minimum": 0}, {"type": "boolean"})
AB = {"type": "object", "properties": {"a": A, "b": B}, "required": ["a"]}
REFS = {
    "$defs": {
        "A": {"type": "object", "properties": {"a": A}, "required": ["a"]},
        "B": {"type": "object", "properties": {"b": B}},
    }
}
GOOD, BOTH, MORE = '{"a": 1}', '{"a": 1, "b": true}', '{"a": 1, "c": 2}'
ONLY_A, AND_B, ANY = {GOOD}, {GOOD, BOTH}, {GOOD, BOTH, MORE}
CLOSED = {
    "properties": (AB, AND_B),
    "true": ({**AB, "additionalProperties": True}, ANY),
    "a schema": ({**AB, "additionalProperties": {"type": "null"}}, AND_B),
    "nothing is listed": ({"type": "object"}, ANY),
    "required and not listed": ({"properties": {"a": A}, "required": ["a", "c"]}, {MORE}),
    "patternProperties": ({"type": "object", "patternProperties": {"^[ac]$": A}}, {GOOD, MORE}),
    "$ref": ({**REFS, "$ref": "#/$defs/A"}, ONLY_A),
    "$ref described": ({**REFS, "$ref": "#/$defs/A", "title": "A"}, ONLY_A),
    "allOf of one": ({**REFS, "allOf": [{"$ref": "#/$defs/A"}]}, ONLY_A),
    "allOf of two": ({**REFS, "allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}, AND_B),
    "$ref beside properties": (
        {**REFS, "type": "object", "properties": {"b": B}, "allOf": [{"$ref": "#/$defs/A"}]},
        {GOOD},
    ),
    "allOf with true": ({"allOf": [AB, {**AB, "additionalProperties": True}]}, ANY),
    "anyOf": ({**REFS, "anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}, ONLY_A),
    "anyOf beside properties": (
        {**AB, "anyOf": [{"properties": {"a": {"maximum": 4}}}, {"required": ["b"]}]}, AND_B,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_objects_have_the_properties_that_are_listed(compiler, name):
    schema, good = CLOSED[name]
    before = json.dumps(schema)
    for text in ANY:
        for output_format, answer in formats(schema, text):
            assert accepts(compiler, output_format, answer) == (text in good), answer
    inside = {"type": "array", "items": schema, "$defs": schema.get("$defs", {})}
    for text in ANY:
        assert accepts(compiler, schema_format(inside), f"[{text}]") == (text in good), text
    assert json.dumps(schema) == before


def test_a_recursive_schema_is_closed_at_each_level(compiler):
    node = {**AB["properties"], "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}
    output_format = schema_format({"type": "object", "properties": node, "required": ["a"]})
    assert accepts(compiler, output_format, '{"a": 1, "next": {"a": 2, "next": null}}')
    assert not accepts(compiler, output_format, '{"a": 1, "next": {"a": 2, "c": 3}}')


@pytest.mark.parametrize(
    ("parameters", "good"),
    [
        (None, {"{}"}),
        ({}, {"{}"}),
        ({"type": "object"}, {"{}"}),
        ({"type": "object", "properties": {}}, {"{}"}),
        ({"type": "object", "additionalProperties": True}, {"{}", *ANY}),
        (AB, AND_B),
        ({"anyOf": [AB, {"type": "object", "properties": {}}]}, {"{}", *AND_B}),
    ],
)
def test_a_call_that_is_required_invents_no_arguments(compiler, parameters, good):
    for arguments in ("{}", *ANY):
        for output_format, answer in calls(parameters, arguments):
            assert accepts(compiler, output_format, answer) == (arguments in good), answer


@pytest.mark.parametrize(
    "kind", ["json_schema", "json_object", "call", "calls", "calls_or", "generic"]
)
def test_numbers_end(compiler, kind):
    """Whatever the model would write: here digits wherever one may be written."""
    schema = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    value, begin = {
        "json_schema": (schema, '{"a":'), "json_object": (None, '{"a":'),
        "call": ([tool], '<tool_call>\n{"name": "f", "arguments": {"a":'),
        "calls": (([tool], True), 'He said "12345678901234567890": <tool_call>{"name": "f",'
                  '"arguments": {"a":'),
        "calls_or": (([tool], True, schema_format(schema)), '{"a":'),
        "generic": (GenericTools([tool], False, False, schema), '{"tool_calls": [{"name": "f",'
                    '"arguments": {"a":'),
    }[kind]  # fmt: skip
    state = compiler.constraint(OutputFormat(kind, value, "form"))()
    for token in compiler.tokenizer.encode(begin):
        assert state.mask()[token]
        state.accept(token)
    digits = 0
    for _ in range(5 * MAX_DIGITS):
        fits = (state.mask() & compiler.digit_mask).nonzero()
        if not len(fits):
            break
        state.accept(int(fits[-1]))
        digits += len(compiler.token_bytes(int(fits[-1])))
    assert MAX_DIGITS <= digits < MAX_DIGITS + 8
    point = compiler.tokenizer.encode(".")[0]
    assert state.mask()[point]
    state.accept(point)
    assert (state.mask() & compiler.digit_mask).any()


def test_strings_and_required_digits_are_as_long_as_they_have_to_be(compiler):
    long = "1" * 60
    assert accepts(compiler, schema_format({"type": "string"}), f'"{long}"')
    assert accepts(compiler, schema_format({"type": "string"}), f'"\\"{long}"')
    many = {"type": "integer", "minimum": 10**18, "maximum": 10**19}
    assert accepts(compiler, schema_format(many), "5" + "0" * 18)
    assert accepts(compiler, OutputFormat("regex", "[0-9]*", "regex"), long)


REFUSED = {
    "a schema that never ends": schema_format({"$ref": "#"}),
    "half a megabyte": schema_format({"const": "ab c" * 125_000}),
    "a deep schema": schema_format(json.loads('{"items":' * 200 + "{}" + "}" * 200)),
    "a deep constant": schema_format({"const": json.loads("[" * 500 + "]" * 500)}),
    "10^8 characters": OutputFormat(
        "regex", "((((a{100}){100}){100}){100})", "structured_outputs.regex"
    ),
    "too many states": OutputFormat("regex", "(a?){3000}a{3000}", "structured_outputs.regex"),
    "a large schema beside tools": OutputFormat(
        "calls_or", ([TOOL], True, schema_format({"const": "x" * 2**16})), "response_format"
    ),
    "all generic tools": OutputFormat(
        "generic", GenericTools([{**TOOL, "description": "x" * 2**18}], True, True, {}), "tools"
    ),
    "all tools": OutputFormat(
        "call", [{"function": {"name": "f", "description": "x" * 2**18}}], "tools"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_without_a_first_token_is_the_clients_fault(compiler, name):
    """It is refused before the engine has it, so no server's failure is counted."""
    with pytest.raises(OutputFormatError, match=f"^{REFUSED[name].param}: expected") as refused:
        compiler.constraint(REFUSED[name])
    assert refused.value.param == REFUSED[name].param


def test_a_grammar_that_fails_later_is_the_clients_fault(compiler):
    error = generation_error(Piece([], "", [], "refused", "grammar: expected a token, got none"))
    assert (error.status, error.code) == (400, "grammar")
    ambiguous = OutputFormat(
        "grammar", "start: s\ns: s s | /[a-z]/ | s s s", "structured_outputs.grammar"
    )
    state = compiler.constraint(ambiguous)()
    with pytest.raises(grammar.ConstraintError, match="expected a smaller grammar, got: "):
        for token in compiler.tokenizer.encode("thetreeseestheriver" * 9):
            state.mask()
            state.accept(token)


def test_a_text_that_is_forced_is_encoded_once(compiler, monkeypatch):
    encoded, encode = [], compiler.tokenizer.encode
    monkeypatch.setattr(
        compiler.tokenizer, "encode", lambda text: (encoded.append(text), encode(text))[1]
    )
    text = "The tree sees the river. " * 100
    make = compiler.constraint(schema_format({"const": text}))
    for _ in range(2):
        state, ids = make(), []
        while not state.mask()[compiler.stop_ids].all():
            (token,) = state.mask().nonzero()[0].tolist()
            state.accept(token)
            ids.append(token)
        assert compiler.tokenizer.decode(ids) == json.dumps(text)
    assert sum(map(len, encoded)) < 4 * len(text)


def test_references_are_followed_once():
    """Each of 40 schemas refers to the next one twice: 2^40 if each way were followed."""
    defs = {
        f"a{i}": {"properties": {f"p{i}": True}, "allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}
        for i in range(40)
    }
    defs["a40"] = {"type": "object", "properties": {"x": True}}
    schema = {"$ref": "#/$defs/a0", "$defs": defs, "properties": {"z": True}}
    names = close_objects(schema)["allOf"][0]["properties"]
    assert sorted(names) == sorted(["x", "z", *(f"p{i}" for i in range(40))])


def test_a_long_chain_of_references_is_the_clients_fault(compiler):
    defs = {f"a{i}": {"properties": {}, "$ref": f"#/$defs/a{i + 1}"} for i in range(1200)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**defs, "a1200": {}}, "properties": {"z": True}}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # the default; a library may have set a higher one
    try:
        with pytest.raises(OutputFormatError, match="a shorter chain of references"):
            compiler.constraint(schema_format(schema))
    finally:
        sys.setrecursionlimit(limit)
