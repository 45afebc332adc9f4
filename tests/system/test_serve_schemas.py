"""Structured output, checked by `jsonschema`: answers match their schema, or it is a 400."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jsonschema
import pytest
from serve_app import HTTP, ask, serve_model, tiny_model

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SHORT = {"type": "string", "maxLength": 5}


def table(required=None, **properties):
    return {
        "type": "object", "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }  # fmt: skip


# each is bounded: an answer that never ends matches no schema
ENFORCED = {
    "$ref": {
        "$defs": {"point": table(x=DIGIT, y=DIGIT), "n": {"type": "integer", "maximum": 9}},
        **table(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/n", "minimum": 7}),
    },
    "recursion": {
        "$defs": {"node": table(value=DIGIT, next={"anyOf": [{"type": "null"}, DIGIT,
                                                             {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
    "allOf": {
        "type": "object", "properties": {"a": DIGIT, "b": {"enum": ["x", "y"]}},
        "additionalProperties": False,
        "allOf": [{"required": ["a"]}, {"required": ["b"]}, {"properties": {"a": {"minimum": 5}}}],
    },
    "allOf of numbers": {
        "allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 9}, {"multipleOf": 2}]
    },
    "anyOf": {"anyOf": [table(kind={"const": "a"}, n=DIGIT), table(s=SHORT), {"type": "boolean"}]},
    "anyOf beside others": {
        **table(a=DIGIT),
        "anyOf": [{"properties": {"a": {"maximum": 2}}}, {"properties": {"a": {"minimum": 8}}}],
    },
    "oneOf": {"oneOf": [table(kind={"const": "a"}, n=DIGIT), table(kind={"const": "b"}, s=SHORT)]},
    "enum": table(a={"enum": [1, "two", None, [3], {"four": 4}]}, b={"enum": ["é", '"\n']}),
    "const": table(a={"const": {"deep": [1, {"x": 'é\n"'}]}}),
    "arrays": {
        "type": "array", "minItems": 1, "maxItems": 3,
        "items": {"type": "array", "minItems": 2, "maxItems": 2,
                  "items": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}},
    },
    "prefixItems": {
        "type": "array", "prefixItems": [DIGIT, {"type": "boolean"}, SHORT], "items": False,
        "minItems": 3,
    },
    "pattern": table(
        a={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        b={"type": "string", "pattern": "x[0-9]", "maxLength": 6},
    ),
    "format": table(**{name: {"type": "string", "format": name} for name in
                       ("date", "uuid", "ipv4")}),
    "numbers": table(
        a={"type": "number", "minimum": -1.5, "maximum": 1.5},
        b={"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
        c={"type": "integer", "minimum": -20, "maximum": -10, "multipleOf": 5},
    ),
    "lengths": table(
        a={"type": "string", "minLength": 3, "maxLength": 4},
        b={"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4},
    ),
    "patternProperties": {
        "type": "object", "patternProperties": {"^x_[a-c]$": DIGIT}, "additionalProperties": False
    },
    "nullable": table(
        a={"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        b={"anyOf": [SHORT, {"type": "null"}]},
    ),
    "optional": table(["b"], a=DIGIT, b={"type": "boolean"}, c={"type": "null"}),
}  # fmt: skip
LISTS = {"type": "array", "items": DIGIT, "uniqueItems": True}
LENIENT = {"x-guidance": {"lenient": True, "coerce_one_of": True}}
# schemas that cannot be enforced, also if the schema itself is lenient
REFUSED = {
    "uniqueItems": LISTS,
    "contains": {"type": "array", "contains": {"const": 7}},
    "oneOf that overlaps": {"oneOf": [{**DIGIT, "maximum": 5}, {**DIGIT, "minimum": 4}]},
    "not": table(a={**DIGIT, "not": {"const": 2}}),
    "if": {**table(a=DIGIT), "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependentRequired": {**table([], a=DIGIT, b=DIGIT), "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^[a-c]$"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "look-ahead": {"type": "string", "pattern": "^(?!a)b"},
    "a format of nobody": {"type": "string", "format": "color"},
    "nothing fits": {"type": "string", "format": "date", "maxLength": 5},
    "lenient": {**LISTS, **LENIENT},
    "lenient, oneOf": {"oneOf": [{**DIGIT, "maximum": 5}, {**DIGIT, "minimum": 4}], **LENIENT},
    "lenient within": table(a={**LISTS, **LENIENT}),
    "lenient by reference": {"$defs": {"a": {**LISTS, **LENIENT}}, "$ref": "#/$defs/a", **LENIENT},
}


@pytest.fixture(scope="module")
def server():
    model, tokenizer = tiny_model(1024)
    with serve_model(model, tokenizer) as (url, _):
        yield SimpleNamespace(url=url, tokenizer=tokenizer)


def body(**fields):
    return {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1,
        "max_tokens": 400, **fields,
    }  # fmt: skip


def test_answers_match_their_schemas(server):
    # without line breaks and long strings
    bias = {'"': 5, "}": 5, "]": 5, "\n": -100}
    bias = {str(server.tokenizer.encode(text)[0]): value for text, value in bias.items()}

    def answers(schema):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        request = body(response_format=form, n=2, seed=1, logit_bias=bias)
        response = HTTP.post(server.url + "/v1/chat/completions", json=request, timeout=600)
        assert response.status_code == 200, response.text
        return [choice["message"]["content"] for choice in response.json()["choices"]]

    with ThreadPoolExecutor(len(ENFORCED)) as pool:  # one batch
        texts_by_name = dict(zip(ENFORCED, pool.map(answers, ENFORCED.values())))
    for name, texts in texts_by_name.items():
        check = jsonschema.Draft202012Validator(
            ENFORCED[name], format_checker=jsonschema.FormatChecker()
        )
        for text in texts:
            try:
                check.validate(json.loads(text))
            except (ValueError, jsonschema.ValidationError) as error:
                raise AssertionError(f"{name}: {text!r}") from error
    assert (
        sum(len(set(texts)) > 1 for texts in texts_by_name.values()) > len(ENFORCED) / 2
    )  # seeds matter


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_enforced_is_refused(server, name):
    schema = REFUSED[name]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": table(a=schema)}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    for param, fields in (
        ("response_format", {"response_format": form}),
        ("structured_outputs.json", {"structured_outputs": {"json": schema}}),
        ("tool_choice", {"tools": [tool], "tool_choice": "required"}),
        ("tools", {"tools": [strict]}),
    ):
        response = ask(server.url, body(max_tokens=1, **fields))
        assert response.status_code == 400, (param, response.text)
        assert response.json()["error"]["param"] == param
