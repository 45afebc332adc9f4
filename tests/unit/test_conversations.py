"""Conversations for fine-tuning: the recognised row formats, refusals and
their messages, and the trained tokens of a conversation.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from fastlm.data.conversations import RowCounts, parse_conversation, read_conversations
from fastlm.errors import InputError
from fastlm.tokenizer.chat_template import CHATML
from fastlm.tokenizer.tokenizer import Tokenizer

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
SHAPES = {
    "openai": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "openai parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWER]},
        [USER, ANSWER],
    ),
    "openai tools": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "x"},
                ANSWER,
            ],
            "tools": [CALL],
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "x"},
            ANSWER,
        ],
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        },
        [SYSTEM, USER, ANSWER],
    ),
    "sharegpt tools": (
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "tools": "",
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4"},
            ANSWER,
        ],
    ),
    "alpaca": ({"instruction": "Add.", "input": "2+2?", "output": "4"}, [
        {"role": "user", "content": "Add.\n\n2+2?"}, ANSWER,
    ]),
    "alpaca history": (
        {
            "instruction": "2+2?",
            "input": "",
            "output": "4",
            "system": "Be brief.",
            "history": [["1+1?", "2"]],
        },
        [
            SYSTEM,
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            USER,
            ANSWER,
        ],
    ),
    "openai's older calls": (
        {
            "system": "Be brief.",
            "messages": [
                {"role": "system", "content": ""},
                USER,
                {"role": "assistant", "content": None, "function_call": {
                    "name": "add", "arguments": json.dumps({"a": 2, "b": 2}),
                }},
                {"role": "function", "content": ""},
                {**ANSWER, "tool_calls": []},
            ],
            "functions": [CALL["function"]],
        },
        [
            SYSTEM,
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": ""},
            ANSWER,
        ],
    ),
    "sharegpt under openai's names": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "2+2?", "weight": 0},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "x"},
                {"from": "gpt", "value": "4", "weight": 1},
            ]
        },
        [
            SYSTEM,
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "x"},
            ANSWER,
        ],
    ),
    "pair": ({"prompt": "2+2?", "completion": "4"}, [USER, ANSWER]),
    "pair of messages": ({"prompt": [SYSTEM, USER], "response": [ANSWER]}, [SYSTEM, USER, ANSWER]),
}  # fmt: skip


def called(calls):
    return {**ANSWER, "tool_calls": calls}


REFUSED = {
    "expected an object with messages (OpenAI), conversations (ShareGPT), instruction and output"
    " (Alpaca), or prompt and completion, got 'text'": {"text": "hello"},
    "messages[0]: expected system or user first, got assistant": {"messages": [ANSWER]},
    "messages[1]: expected assistant after user, got user": {"messages": [USER, USER, ANSWER]},
    "messages[2]: expected user or tool after assistant, got system": {
        "messages": [USER, ANSWER, SYSTEM]
    },
    "messages[1]: expected text from the assistant, got an empty message": {
        "messages": [USER, {"role": "assistant", "content": " \n"}]
    },
    "expected an answer at the end, got user": {"messages": [USER]},
    "expected an answer at the end, got no message": {"messages": []},
    "messages: expected a list of messages, got str": {"messages": "hello"},
    "messages[0]: expected text, got int": {"messages": [{"role": "user", "content": 5}]},
    "messages[0]: expected parts of type 'text', got 'image_url'": {
        "messages": [{"role": "user", "content": [{"type": "image_url"}]}]
    },
    "messages[1]: expected a weight of 0 or 1, got 0.5": {
        "messages": [USER, {**ANSWER, "weight": 0.5}]
    },
    "expected an assistant message to train on, all have weight 0": {
        "messages": [USER, {**ANSWER, "weight": 0}]
    },
    "conversations[0]: expected a call as JSON, got 'add(2)'": {
        "conversations": [{"from": "function_call", "value": "add(2)"}]
    },
    "conversations: expected a list of turns, got dict": {"conversations": {}},
    "output: expected text, got list": {"instruction": "Add.", "output": [4]},
    "conversations[1]: expected text from the assistant, got an empty message": {
        "system": "x", "conversations": [
            {"from": "human", "value": "a"}, {"from": "gpt", "value": ""}
        ],
    },
    "instruction: expected text from the user, got an empty message": {
        "instruction": "", "output": "b",
    },
    "system: expected none in addition to messages[0], got two system messages": {
        "system": "x", "messages": [SYSTEM, USER, ANSWER],
    },
    "messages[1].tool_calls: expected a list, got str": {"messages": [USER, called("abc")]},
    "messages[1].tool_calls[0]: expected a call with a name, got 'x'": {
        "messages": [USER, called(["x"])],
    },
    "messages[1].tool_calls[0]: expected a call with a name, got {}": {
        "messages": [USER, called([{}])],
    },
    "messages[1].tool_calls[0]: expected arguments as JSON, got '2+'": {
        "messages": [USER, called([{"name": "a", "arguments": "2+"}])],
    },
    "messages[1].tool_calls[0]: expected arguments as an object, got [2]": {
        "messages": [USER, called([{"name": "a", "arguments": "[2]"}])],
    },
    "history[0]: expected [question, answer], got 'x'": {
        "instruction": "a", "output": "b", "history": ["x"],
    },
    "tools: expected a list as JSON, got 'add'": {"messages": [USER, ANSWER], "tools": "add"},
    f"tools: expected a list as JSON, got {'[' * 100_000!r:.60}": {
        "messages": [USER, ANSWER], "tools": "[" * 100_000,
    },
    f"messages[1].tool_calls[0]: expected arguments as JSON, got {'[' * 100_000!r:.60}": {
        "messages": [USER, called([{"name": "a", "arguments": "[" * 100_000}])],
    },
    "completion: expected valid Unicode, got a lone surrogate at 1": {
        "prompt": "a", "completion": "b\ud800",
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape) -> None:
    row, expected = SHAPES[shape]
    conversation = parse_conversation(row)
    assert conversation.messages == expected
    assert conversation.loss_mask == [m["role"] == "assistant" for m in expected]
    assert conversation.tools == (
        [CALL] if shape in ("openai tools", "openai's older calls") else None
    )


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message) -> None:
    with pytest.raises(InputError) as refusal:
        parse_conversation(REFUSED[message])
    assert str(refusal.value) == message


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(InputError, match=r"messages\[0\]: expected a role, one of .*, got 'bard'"):
        parse_conversation({"messages": [{"role": "bard", "content": "x"}]})


def test_a_weight_of_zero_is_context() -> None:
    conversation = parse_conversation({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]})
    assert conversation.loss_mask == [False, False, False, True]
    assert conversation.messages[1] == ANSWER
    # the answers in a prompt are examples
    conversation = parse_conversation({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert conversation.loss_mask == [False, False, False, True]


def write(path: Path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_bad_row_is_an_error_with_its_line(tmp_path) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, "", {"messages": [USER]})
    with pytest.raises(InputError) as refusal:
        list(read_conversations([file], cache=tmp_path))
    assert str(refusal.value) == (f"{file}, line 3: expected an answer at the end, got user")


def test_bad_rows_are_counted_and_reported_on_request(tmp_path) -> None:
    good = {"messages": [USER, ANSWER]}
    file = write(tmp_path / "a.jsonl", good, "{", *[{"messages": [USER]}] * 4, good)
    rows, messages = RowCounts(), []
    conversations = list(
        read_conversations(
            [file], cache=tmp_path, skip_bad=True, rows=rows, on_skip=messages.append
        )
    )
    assert [c.location for c in conversations] == [f"{file}, line 1", f"{file}, line 7"]
    assert (rows.total, dict(rows.by_reason)) == (7, {"malformed": 5})
    assert len(messages) == 4 and "line 2" in messages[0] and "2 more of its 7 lines" in messages[3]
    bad = write(tmp_path / "b.jsonl", "{")
    with pytest.raises(InputError, match=r"b\.jsonl, line 1: expected one JSON object"):
        list(read_conversations([bad], cache=tmp_path, skip_bad=True))


def test_rows_of_folders_and_arrays(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "b.jsonl", {"prompt": "a", "completion": "b"})
    (tmp_path / "data" / "a.json").write_text(json.dumps([{"prompt": "c", "completion": "d"}]))
    (tmp_path / "data" / "notes.md").write_text("not read")
    messages = []
    conversations = list(
        read_conversations([str(tmp_path / "data")], cache=tmp_path, on_skip=messages.append)
    )
    assert [c.messages[1]["content"] for c in conversations] == ["d", "b"]
    assert messages == [f"{tmp_path / 'data'}: 1 files that are not read: expected .jsonl or .json"]
    only = [f"{tmp_path / 'data'}#*.jsonl"]
    assert (
        len(list(read_conversations(only, cache=tmp_path, on_skip=messages.append)))
        == len(messages)
        == 1
    )
    text = write(tmp_path / "c.txt", "hello")
    with pytest.raises(InputError, match=r"expected \.jsonl or \.json files, got none"):
        list(read_conversations([text], cache=tmp_path))


# ---- tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox: 2+2?\n\nassistant user 4 = four\n" * 9], 300)


def encode_single(
    tokenizer: Tokenizer, messages, learnt=None, **variables
) -> tuple[list[int], list[bool]]:
    (pair,) = tokenizer.encode_conversation(messages, learnt, **variables)
    return pair


def learnt_text(tokenizer: Tokenizer, ids, mask) -> list[str]:
    runs: list[list[int]] = []
    for i, (token, learn) in enumerate(zip(ids, mask, strict=True)):
        if learn and not (i and mask[i - 1]):
            runs.append([])
        if learn:
            runs[-1].append(token)
    return [tokenizer.decode(run, special=True) for run in runs]


def test_the_answers_and_their_end_tokens_are_learnt(tokenizer) -> None:
    messages = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "\n\nfour"}]
    ids, mask = encode_single(tokenizer, messages)
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    assert tokenizer.decode(ids, special=True) == text
    assert learnt_text(tokenizer, ids, mask) == ["4<|im_end|>", "\n\nfour<|im_end|>"]
    assert not mask[-1]  # the line break after the end token
    _, some = encode_single(tokenizer, messages, [False, False, False, False, True])
    assert learnt_text(tokenizer, ids, some) == ["\n\nfour<|im_end|>"]


def test_a_prompt_has_the_tokens_of_generation(tokenizer) -> None:
    """An answer that begins with a line break does not change the tokens of the prompt, which ends
    with one.
    """
    messages = [USER, {"role": "assistant", "content": "\n4"}]
    ids, mask = encode_single(tokenizer, messages)
    prompt = tokenizer.encode_chat(messages[:1])
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)


def test_end_tokens_in_messages_are_text(tokenizer) -> None:
    messages = [
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    ids, mask = encode_single(tokenizer, messages)
    end = tokenizer.encode_chat([], add_generation_prompt=False)
    assert end == []
    ends = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    assert len(ends) == 2  # one for each message, which the template wrote
    assert mask[ends[1]] and not mask[ends[0]]
    assert learnt_text(tokenizer, ids, mask) == ["<|im_end|><|im_end|>"]


def test_the_real_smollm2_learns_to_stop() -> None:
    """Its pad token is its end token: a mask by ids would never learn it."""
    tokenizer = Tokenizer.load("model:smollm2")
    assert tokenizer.pad_id == tokenizer.eos_id
    ids, mask = encode_single(tokenizer, [USER, ANSWER])
    assert learnt_text(tokenizer, ids, mask) == ["4<|im_end|>"]
    assert ids == tokenizer.encode_chat([USER, ANSWER], add_generation_prompt=False)


WITH_BOS = "{{ bos_token }}" + CHATML
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOKS_AHEAD = "{{ m.content }}{% if loop.last and m.role == 'assistant' %}!{% endif %}"
CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TEMPLATES = {
    "expected one that writes the text of message 0 (system), got none of it": (
        CHAT.replace("in messages", "in messages if m.role != 'system'"),
        [{"role": "system", "content": "2+2?"}, USER, ANSWER],  # its text is in another message
        {},
    ),
    "expected one that writes the tool calls of message 1 (assistant), got none of it": (
        CHAT, [{"role": "user", "content": "add!"}, CALLED[1]], {},
    ),
    "expected one that writes the tools, got none of it": (
        "{% if tools %}You have tools.{% endif %}" + CHAT, [USER, ANSWER], {"tools": [CALL]},
    ),
    "expected one that writes the complete content of message 1 (assistant),"
    " got 'four and no more<|im_end|>\\n'": (
        CHAT.replace("m.content", "m.content[:16]"),
        [USER, {"role": "assistant", "content": "four and no more and no less"}],
        {},
    ),
    "expected one that writes the complete reasoning of message 1 (assistant),"
    " got '4<|im_end|>\\n'": (
        CHAT, [USER, {**ANSWER, "reasoning": "2 and 2"}], {},
    ),
    "expected one that ends an answer with <|endoftext|>, <|im_end|>, got '4\\n'": (
        CHAT.replace("<|im_end|>", ""), [USER, ANSWER], {},
    ),
    "expected a generation prompt with which answers begin, got"
    " '\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n<|' before message 1": (
        CHAT.replace("assistant\n", "assistant\n<|"), [USER, ANSWER], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", TEMPLATES)
def test_templates_that_cannot_be_learnt(tokenizer, message) -> None:
    template, messages, variables = TEMPLATES[message]
    other = Tokenizer(tokenizer._backend, tokenizer._roles, template)
    for _ in range(2):  # it is not remembered as checked
        with pytest.raises(InputError) as refusal:
            other.encode_conversation(messages, **variables)
        assert str(refusal.value) == f"chat_template: {message}"


def test_a_template_that_looks_ahead_gives_an_example_per_answer(tokenizer) -> None:
    other = Tokenizer(
        tokenizer._backend, tokenizer._roles, CHAT.replace("{{ m.content }}", LOOKS_AHEAD)
    )
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "four"}]
    pairs = other.encode_conversation(messages)
    assert [learnt_text(other, *pair) for pair in pairs] == [["4!<|im_end|>"], ["four!<|im_end|>"]]
    assert [other.decode(ids).count("!") for ids, _ in pairs] == [1, 1]
    pairs = other.encode_conversation(messages, [False, False, False, True])
    assert [learnt_text(other, *pair) for pair in pairs] == [["four!<|im_end|>"]]


def test_the_date_of_a_template_is_given(tokenizer) -> None:
    dated = Tokenizer(tokenizer._backend, tokenizer._roles, "{{ strftime_now('%d %b %Y') }}" + CHAT)
    ids, _ = encode_single(dated, [USER, ANSWER], date="2024-07-26")
    assert dated.decode(ids).startswith("26 Jul 2024")
    prompt = dated.encode_chat([USER], date="2024-07-26")
    assert ids[: len(prompt)] == prompt


# Published templates, as TRL has them: file -> end token, has tools, examples of two answers
PUBLISHED = {
    "llama3": ("<|eot_id|>", False, 1),
    "llama3_1": ("<|eot_id|>", True, 1),
    "llama3_2": ("<|eot_id|>", True, 1),
    "qwen2_5": ("<|im_end|>", True, 1),
    "qwen3": ("<|im_end|>", True, 2),
    "qwen3_instruct_2507": ("<|im_end|>", True, 1),
    "gemma3": ("<end_of_turn>", False, 1),
    "phi3_5": ("<|end|>", False, 2),
}


def published(name: str, end: str) -> Tokenizer:
    """A small tokenizer with a published template and the special tokens that it names."""
    trl = importlib.util.find_spec("trl")
    assert trl and trl.origin
    template = (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    special = {"<bos>", *re.findall(r"<\|?[a-z_]+\|?>", template)} - {end}
    text = ["2+2? 4 four Be brief." * 9]
    tokenizer = Tokenizer.train(text, 600, special_tokens=[end, *sorted(special)])
    roles = {"eos_token": end, "bos_token": "<bos>"}
    return Tokenizer(tokenizer._backend, roles, template)


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_of_published_models(name) -> None:
    end, has_tools, examples = PUBLISHED[name]
    tokenizer = published(name, end)
    messages = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "four"}]
    pairs = tokenizer.encode_conversation(messages, date="2024-07-26")
    assert len(pairs) == examples
    learnt = [text for pair in pairs for text in learnt_text(tokenizer, *pair)]
    assert [text.split("</think>")[-1].strip() for text in learnt] == [f"4{end}", f"four{end}"]
    if has_tools:
        arguments = {
            "messages": [*CALLED, {"role": "tool", "content": "4"}, ANSWER],
            "tools": [CALL],
        }
        (call, *_) = [
            text
            for pair in tokenizer.encode_conversation(date="2024-07-26", **arguments)
            for text in learnt_text(tokenizer, *pair)
        ]
        assert re.search(r'"a": 2, "b": 2', call) and call.endswith(end)


def test_an_answer_of_several_channels_is_learnt_to_its_end() -> None:
    """gpt-oss ends its reasoning with an end token, and the answer follows."""
    tokenizer = published("gptoss", "<|return|>")
    messages = [USER, {**ANSWER, "thinking": "hmm"}]
    pairs = tokenizer.encode_conversation(messages, date="2024-07-26")
    (text,) = [text for pair in pairs for text in learnt_text(tokenizer, *pair)]
    assert "hmm<|end|>" in text and text.endswith("4<|return|>")


def test_one_bos(tokenizer) -> None:
    roles = {**tokenizer._roles, "bos_token": "<|endoftext|>"}
    other = Tokenizer(tokenizer._backend, roles, WITH_BOS)
    ids, _ = encode_single(other, [USER, ANSWER, USER, ANSWER])
    assert ids.count(other.bos_id) == 1 and ids[0] == other.bos_id
