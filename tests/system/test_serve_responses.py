"""`/v1/responses` field by field, as in test_serve_fields.py, and with OpenAI's client."""

import json

import openai
import pytest
from serve_fields import FIELDS, TOOL, FieldClient, Person, case_table, check, field_server

from fastlm.serve.api_error import ApiError
from fastlm.serve.completions_api import with_previous
from fastlm.serve.protocol.responses_api import ResponsesRequest

CASES, case = case_table()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with field_server(tmp_path_factory.mktemp("serve")) as server:
        yield server


def event_types(events):
    return [event.type.removeprefix("response.") for event in events]


@case("model", "input", "instructions", kinds=("responses",))
def _(api):
    chat = FieldClient(api.server, "chat")
    assert api.texts() == chat.texts()
    response = api.client.responses.create(
        model="tiny", input="Hi", max_output_tokens=8, temperature=0, metadata={"team": "a"}
    )
    assert [response.output_text] == chat.texts() and response.metadata == {"team": "a"}
    assert (
        response.status == "incomplete"
        and response.incomplete_details.reason == "max_output_tokens"
    )
    assert (
        response.usage.output_tokens == 8
        and response.usage.total_tokens == response.usage.input_tokens + 8
    )
    assert response.id.startswith("resp_") and response.store is False and response.model == "tiny"
    ended = api.answer(logit_bias={str(api.server.tokenizer.eos_id): 100})
    assert ended["status"] == "completed" and ended["incomplete_details"] is None
    system = {"role": "system", "content": "Be kind"}
    expected = chat.texts(messages=[system, {"role": "user", "content": "Hi"}])
    assert api.texts(instructions="Be kind") == expected
    parts = [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]
    items = [{"type": "message", "role": "user", "content": parts}]
    assert api.texts(input=[{**system, "role": "developer"}, *items]) == expected
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 7}'}
    result = {"type": "function_call_output", "call_id": "c1", "output": "8"}
    message = response.output[0].model_dump()  # unchanged
    api.answer(input=[*items, message, {**call, "id": "fc_1", "status": "completed"}, result])
    text = api.server.tokenizer.decode(api.server.requests[-1].prompt)
    assert response.output_text in text and '"arguments": {"a": 7}' in text and "tool\n8" in text
    api.expect_error("model", model=None)
    assert api.send(model="x").status_code == 404
    api.expect_error("instructions", instructions=7)
    for bad, at in (
        ([], "input"), ("", "input"), (["Hi"], "input[0]"), ([{"role": "robot", "content": "x"}],
        "input[0].role"), ([{"type": "reasoning", "summary": []}], "input[0]"),
        ([{**call, "arguments": "7"}], "input[0].arguments"),
        ([{**items[0], "content": [{"type": "input_image"}]}], "input[0].content[0]"),
        ([{**items[0], "quality": 1}], "input[0].quality"),
    ):  # fmt: skip
        api.expect_error(at, input=bad)


@case("max_output_tokens", "max_tool_calls", "background", "truncation", kinds=("responses",))
def _(api):
    assert api.answer(max_output_tokens=3)["usage"]["output_tokens"] == 3
    api.expect_error("max_output_tokens", max_output_tokens=0)
    assert api.texts(max_tool_calls=2, background=False, truncation="disabled") == api.texts()
    api.expect_error("max_tool_calls", max_tool_calls=0)
    api.expect_error("background", background=True)
    api.expect_error("truncation", truncation="auto")


@case("reasoning", "text", kinds=("responses",))
def _(api):
    response = api.send(reasoning={"effort": "low"}, text={"verbosity": "low"})
    assert response.headers["x-fastlm-ignored"] == "reasoning_effort, verbosity"
    assert response.json()["reasoning"]["effort"] == "low"
    api.expect_error("reasoning.strength", reasoning={"strength": 1})
    parsed = api.client.responses.parse(
        model="tiny", input="Hi", max_output_tokens=300, text_format=Person
    )
    assert isinstance(parsed.output_parsed, Person)
    object_form = {"type": "json_object"}
    bias = {str(i): 50 for i in api.server.tokenizer.encode("}")}
    (text,) = api.texts(text={"format": object_form}, logit_bias=bias, max_output_tokens=200)
    assert isinstance(json.loads(text), dict)
    assert api.texts(text={"format": {"type": "text"}}) == api.texts()
    api.expect_error("text.format.schema", text={"format": {"type": "json_schema", "name": "x"}})
    lists = {"type": "json_schema", "name": "x", "schema": {"type": "array", "uniqueItems": True}}
    assert "uniqueItems" in api.expect_error("text.format", text={"format": lists})


@case("tools", "tool_choice", kinds=("responses",))
def _(api):
    tool = {"type": "function", **openai.pydantic_function_tool(Person)["function"]}
    response = api.client.responses.create(
        model="tiny", input="Hi", max_output_tokens=300, tools=[tool], tool_choice="required"
    )
    (call,) = response.output
    assert call.type == "function_call" and call.name == "Person" and response.status == "completed"
    Person.model_validate_json(call.arguments)
    events = list(
        api.client.responses.create(
            model="tiny", input="Hi", max_output_tokens=300, tools=[tool], stream=True,
            tool_choice={"type": "function", "name": "Person"},
        )
    )  # fmt: skip
    assert event_types(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    (call,) = events[-1].response.output
    assert call.arguments == events[3].delta == events[4].arguments and call == events[5].item
    api.answer(tools=[{"type": "function", "name": "add", "parameters": {"type": "object"}}])
    assert '"name": "add"' in api.server.tokenizer.decode(api.server.requests[-1].prompt)
    assert api.texts(tools=[], tool_choice="auto") == api.texts()
    api.expect_error("tools[0].type", tools=[{"type": "web_search"}])
    api.expect_error("tools[0].name", tools=[{"type": "function", "name": "é"}])
    api.expect_error("tools[0].function", tools=[TOOL])
    api.expect_error("tool_choice", tool_choice="required")
    api.expect_error(
        "tool_choice.name", tools=[tool], tool_choice={"type": "function", "name": "x"}
    )


@case("include", "top_logprobs", kinds=("responses",))
def _(api):
    scored = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = api.answer(**scored)["output"][0]["content"]
    chat = FieldClient(api.server, "chat").answer(logprobs=True, top_logprobs=2)
    assert part["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    assert api.answer()["output"][0]["content"][0]["logprobs"] == []
    events = list(
        api.client.responses.create(
            model="tiny", input="Hi", max_output_tokens=8, temperature=0, stream=True, **scored
        )
    )
    text_deltas = [event.to_dict() for event in events if event.type.endswith("output_text.delta")]
    deltas = [entry for delta in text_deltas for entry in delta["logprobs"]]
    assert part["logprobs"][: len(deltas)] == deltas
    done, ended, item, last = (event.to_dict() for event in events[-4:])
    for event in (done, ended["part"], item["item"]["content"][0]):
        assert event["logprobs"] == part["logprobs"]
    assert last["response"]["output"][0]["content"][0]["logprobs"] == part["logprobs"]
    api.expect_error("include", include="all")
    api.expect_error("include[0]", include=["file_search_call.results"])
    api.expect_error("top_logprobs", top_logprobs=21)


@case("stream", "stream_options", kinds=("responses",))
def _(api):
    response = api.answer()
    fields = {"model": "tiny", "input": "Hi", "max_output_tokens": 8, "temperature": 0}
    options = {"include_obfuscation": False}
    events = list(api.client.responses.create(**fields, stream=True, stream_options=options))
    types = event_types(events)
    assert types[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    ends = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert types[-4:] == ends and set(types[4:-4]) == {"output_text.delta"} and len(types) > 12
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events[4:-4])
    assert text == response["output"][0]["content"][0]["text"] == events[-4].text
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    last = events[-1].response
    assert last.output_text == text and last.usage.output_tokens == 8
    assert "[DONE]" not in (stream := api.send(stream=True, stream_options=options).text)
    assert stream.startswith("event: response.created\ndata: {")
    stopped = {"stop": text[3:]}  # the client waits for a response that is complete
    with api.client.responses.stream(**fields, extra_body=stopped) as managed:
        assert managed.get_final_response().output_text == text[:3]
    api.expect_error("stream", stream=1)
    api.expect_error("stream_options.include_usage", stream_options={"include_usage": True})


@case("previous_response_id", "store", "conversation_id", kinds=("responses",))
def _(api):
    first = api.answer(
        store=True, conversation_id="talk-2", instructions="Be kind", input="I am ann@mail.org"
    )
    assert first["store"] is True
    stored = api.server.store.response(first["id"])
    assert stored.prompt[1]["content"] == "I am <EMAIL_1>" and stored.conversation_id == "talk-2"
    answer = first["output"][0]["content"][0]["text"]
    continuation = api.answer(previous_response_id=first["id"], input="And I?")
    assert continuation["previous_response_id"] == first["id"]
    text = api.server.tokenizer.decode(api.server.requests[-1].prompt)
    assert "Be kind" in text and "I am <EMAIL_1>" in text and answer in text and "And I?" in text
    api.answer(previous_response_id=first["id"], instructions="Be short")
    text = api.server.tokenizer.decode(api.server.requests[-1].prompt)
    assert "Be kind" not in text and text.startswith("system\nBe short")
    error = api.expect_error(
        "previous_response_id", previous_response_id=continuation["id"]
    )  # not stored
    assert "send the whole conversation" in error
    start = api.answer(store=True, input="My secret")
    second = api.answer(store=True, previous_response_id=start["id"], input="And now?")
    third = api.answer(store=True, previous_response_id=second["id"], input="And then?")
    assert api.server.store.response(third["id"]).conversation_id == start["id"]
    api.server.store.forget(start["id"])  # its continuations contain it
    assert api.server.store.response(second["id"]) is api.server.store.response(third["id"]) is None
    api.expect_error("store", store="yes")
    api.expect_error("conversation_id", conversation_id="talk-2")
    with pytest.raises(ApiError, match="stores no conversations"):
        request = ResponsesRequest(model="x", input="Hi", previous_response_id="r")
        with_previous(request.chat, None)


@pytest.mark.parametrize("kind, names", CASES, ids=str)
def test_field(server, kind, names):
    check(server, kind, names, CASES[kind, names])


def test_every_field_has_a_test():
    """Fields of a chat are excluded: test_serve_fields.py tests them."""
    tested = {name for _, names in CASES for name in names}
    assert FIELDS["responses"] - FIELDS["chat"] <= tested
