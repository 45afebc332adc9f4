"""Read conversations: rows of JSON in the formats of fine-tuning data sets, checked and converted
to one form.

Rows come from .jsonl and .json files (an array of rows), local or in packages
(`fastlm.sources.source_files`), or from a generator (`fastlm.sources.reasoning_gym`). The format is
recognised by a row's keys:

- OpenAI: ``{"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?}``; an assistant
  message with ``"weight": 0`` is context and not trained on;
- ShareGPT: ``{"conversations": [{"from", "value"}, ...], "tools"?}``;
- Alpaca: ``{"instruction", "input"?, "output", "history"?}``;
- pairs: ``{"prompt", "completion"}`` (or ``"response"``), each a text or a list of messages.

Each may also have a ``"system"`` text.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from fastlm.errors import InputError, check_unicode
from fastlm.sources.reasoning_gym import is_reasoning_gym, reasoning_gym_rows
from fastlm.sources.source_files import (
    Row,
    ignore_message,
    list_files,
    parse_rows,
    read_rows,
    row_unit,
)

FORMATS = ("jsonl", "json")
# role -> the roles that may follow; None is the beginning
NEXT_ROLES = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant"},
    **{"bot": "assistant", "model": "assistant", "observation": "tool", "function": "tool"},
    **{"function_response": "tool", "function_call": "assistant"},
}
ROW_FORMATS = (
    "messages (OpenAI), conversations (ShareGPT), instruction and output (Alpaca), or prompt and"
    " completion"
)

Example = TypeVar("Example")
T = TypeVar("T")
Message = dict[str, Any]
LocatedMessages = list[tuple[str, Message]]  # (location in the row, message)


@dataclass(slots=True)
class Conversation:
    """A checked conversation.

    ``messages``: role, content and other fields of a chat template ("tool_calls", ...). The last
    one is the assistant's. ``loss_mask``: per message, whether the model is trained on it.
    ``location``: file and line, for error messages.
    """

    messages: list[Message]
    loss_mask: list[bool]
    location: str
    tools: list[Any] | None = None

    def prompt(self) -> list[Message]:
        """Return the messages before the first answer."""
        return list(takewhile(lambda m: m["role"] != "assistant", self.messages))

    def to_row(self) -> dict[str, Any]:
        """Return this conversation as a row in OpenAI's form, which `parse_conversation` reads."""
        messages = [
            m if trained or m["role"] != "assistant" else {**m, "weight": 0}
            for m, trained in zip(self.messages, self.loss_mask, strict=True)
        ]
        return {"messages": messages, **({} if self.tools is None else {"tools": self.tools})}

    def key(self) -> str:
        """Return the prompt as text. Conversations that begin with the same questions have equal
        keys.
        """
        return prompt_key(self.prompt())


def message_contents(messages: Sequence[Message]) -> list[list[Any]]:
    """Return the messages without ids and other fields: equal for equal conversations."""
    return [[m["role"], m["content"], m.get("tool_calls")] for m in messages]


def prompt_key(messages: Sequence[Message]) -> str:
    """Return a prompt as text, equal for equal prompts."""
    return json.dumps(message_contents(messages), ensure_ascii=False, sort_keys=True)


@dataclass
class RowCounts:
    """The number of rows read, and the number left out or changed by reason."""

    total: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)


def read_examples(
    sources: Sequence[str],
    parse: Callable[[Any, str], Example],
    *,
    cache: Path,
    skip_bad: bool = False,
    rows: RowCounts | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Example]:
    """Yield ``parse(row, location)`` of each row of all sources, in order. ``parse`` raises
    InputError for a row that cannot be used.

    Such a row is an error that names its file and line. With ``skip_bad`` it is counted in ``rows``
    and left out, and the first ones of a file are reported. A file of only bad rows, or one that
    cannot be read to its end, is then reported and left out too, unless the user named it. Files of
    other types in a folder are reported.

    InputError: also a source that is missing or has no file of JSON rows.
    """
    rows = RowCounts() if rows is None else rows
    for name, unit, explicit, numbered_rows in _list_rows(sources, cache, on_skip):
        try:
            yield from parse_rows(
                _count_rows(numbered_rows, rows), parse, name, unit, counts=rows.by_reason,
                reason="malformed", on_skip=on_skip, skip_bad=skip_bad, required=explicit,
            )  # fmt: skip
        except InputError as error:
            if explicit or not skip_bad:
                raise
            rows.by_reason["unreadable files"] += 1
            on_skip(str(error))


def _count_rows(numbered_rows: Iterable[Row], rows: RowCounts) -> Iterator[Row]:
    for row in numbered_rows:
        rows.total += 1
        yield row


def _list_rows(
    sources: Sequence[str], cache: Path, on_skip: Callable[[str], None]
) -> Iterator[tuple[str, str, bool, Iterable[Row]]]:
    """Yield (name, unit of its numbers, whether the user named it, numbered rows) of each file and
    of each generator.
    """
    for spec in sources:
        if is_reasoning_gym(spec):
            yield spec, "row", True, enumerate(reasoning_gym_rows(spec), 1)
            continue
        all_files, skipped = list_files(spec, cache=cache)
        files = [file for file in all_files if file.format in FORMATS]
        if not files:
            raise InputError(f"source {spec}: expected .jsonl or .json files, got none")
        del skipped["not matched by the glob"]  # the user excluded them
        if others := len(all_files) - len(files) + skipped.total():
            on_skip(f"{spec}: {others:,} files that are not read: expected .jsonl or .json")
        for file in files:
            yield str(file.path), row_unit(file), file.explicit, read_rows(file)


def parse_conversation(row: Any, location: str = "") -> Conversation:
    """Parse a row of one of the formats of `ROW_FORMATS`.

    InputError: the row has another format, an empty message, a role that is unknown or out of
    order, a malformed tool call, or no answer at the end.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"expected an object with {ROW_FORMATS}, got {type(row).__name__}")
    answer = next((key for key in ("completion", "response") if key in row), None)
    if "messages" in row:
        messages = parse_messages(row["messages"], "messages")
    elif "conversations" in row:
        messages = parse_messages(row["conversations"], "conversations")
    elif "instruction" in row and "output" in row:
        messages = [*parse_alpaca_prompt(row), _locate("output", "assistant", row["output"])]
    elif "prompt" in row and answer:
        messages = parse_text_or_messages(row["prompt"], "prompt", "user")
        for _, message in messages if isinstance(row["prompt"], list) else ():
            message.setdefault("weight", 0)  # answers in a prompt are examples
        messages += parse_text_or_messages(row[answer], answer, "assistant")
    else:
        raise InputError(f"expected an object with {ROW_FORMATS}, got {describe_keys(row)}")
    add_system(row, messages)
    check_messages(messages)
    loss_mask = []
    for field_name, message in messages:
        weight = message.pop("weight", 1)
        if message["role"] == "assistant" and weight not in (0, 1):
            raise InputError(f"{field_name}: expected a weight of 0 or 1, got {weight!r:.40}")
        loss_mask.append(message["role"] == "assistant" and weight == 1)
    if not any(loss_mask):
        raise InputError("expected an assistant message to train on, all have weight 0")
    return Conversation([message for _, message in messages], loss_mask, location, parse_tools(row))


def describe_keys(row: Mapping[str, Any]) -> str:
    """List the keys of a row for an error message."""
    return ", ".join(map(repr, row))[:200] or "no keys"


def add_system(row: Mapping[str, Any], messages: LocatedMessages) -> None:
    """Put the row's ``"system"`` text before its messages; leave out an empty system message."""
    if messages and messages[0][1]["role"] == "system" and not messages[0][1]["content"].strip():
        del messages[0]
    system = _locate("system", "system", row.get("system"))
    if system[1]["content"].strip():
        if messages and messages[0][1]["role"] == "system":
            raise InputError(
                f"system: expected none in addition to {messages[0][0]}, got two system messages"
            )
        messages.insert(0, system)


def check_messages(messages: LocatedMessages, may_be_empty: Collection[str] = ("tool",)) -> None:
    """Raise InputError unless the roles are in order, no message is empty (except of the roles
    ``may_be_empty``) and the last message is the assistant's.
    """
    before = None
    for location, message in messages:
        role = message["role"]
        if role not in NEXT_ROLES[before]:
            after = f"after {before}" if before else "first"
            raise InputError(
                f"{location}: expected {' or '.join(NEXT_ROLES[before])} {after}, got {role}"
            )
        is_empty = not message["content"].strip() and not message.get("tool_calls")
        if is_empty and role not in may_be_empty:
            raise InputError(f"{location}: expected text from the {role}, got an empty message")
        before = role
    if before != "assistant":
        raise InputError(f"expected an answer at the end, got {before or 'no message'}")


def parse_text_or_messages(value: Any, name: str, role: str) -> LocatedMessages:
    """Parse a list of messages, or make one message of ``role`` from a text."""
    if isinstance(value, list):
        return parse_messages(value, name)
    return [_locate(name, role, value)]


def parse_messages(values: Any, name: str) -> LocatedMessages:
    """Convert messages with OpenAI's or ShareGPT's names to one form. ``name``: their key in the
    row.
    """
    kind = "turns" if name == "conversations" else "messages"
    messages: LocatedMessages = []
    for i, value in enumerate(_check_type(values, list, name, f"a list of {kind}")):
        location = f"{name}[{i}]"
        message = {
            k: v
            for k, v in _check_type(value, Mapping, location, "an object").items()
            if v is not None
        }
        if "role" not in message:
            message["role"] = message.pop("from", None)
        content = message.get("content", message.pop("value", None))
        if isinstance(content, list):  # parts, as in requests to an API
            content = "".join(_parse_text_part(part, location) for part in content)
        content = check_text(content, location)
        calls, older = message.pop("tool_calls", None), message.pop("function_call", None)
        if older is not None:
            calls = calls or [{"function": older}]
        if message["role"] == "function_call":
            calls, content = [_parse_json(content, f"{location}: expected a call")], ""
        message |= {"role": _parse_role(message["role"], location), "content": content}
        if calls:
            message["tool_calls"] = _parse_tool_calls(calls, f"{location}.tool_calls")
        messages.append((location, message))
    return messages


def _parse_tool_calls(calls: Any, location: str) -> list[Message]:
    """Parse the arguments of calls to objects. OpenAI has them as JSON text, which templates would
    quote a second time.
    """
    parsed = []
    for i, call in enumerate(_check_type(calls, list, location, "a list")):
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise InputError(f"{location}[{i}]: expected a call with a name, got {call!r:.60}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parse_json(arguments, f"{location}[{i}]: expected arguments")
        if not isinstance(arguments, Mapping):
            raise InputError(
                f"{location}[{i}]: expected arguments as an object, got {arguments!r:.60}"
            )
        rest = {k: v for k, v in call.items() if k in ("id", "index") and v is not None}
        function = {"name": name, "arguments": dict(arguments)}
        parsed.append({**rest, "type": "function", "function": function})
    return parsed


def _parse_text_part(part: Any, location: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        got = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InputError(f"{location}: expected parts of type 'text', got {got!r:.40}")
    return check_text(part.get("text", part.get("value")), location)


def parse_alpaca_prompt(row: Mapping[str, Any]) -> LocatedMessages:
    """Return ``"history"``, and ``"instruction"`` with ``"input"``, as messages."""
    messages: LocatedMessages = []
    history = _check_type(row.get("history") or [], list, "history", "a list of pairs")
    for i, pair in enumerate(history):
        location = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{location}: expected [question, answer], got {pair!r:.60}")
        messages += [
            _locate(location, role, text) for role, text in zip(("user", "assistant"), pair)
        ]
    texts = [check_text(row[key], key) for key in ("instruction", "input") if row.get(key)]
    question = "\n\n".join(text for text in texts if text.strip())
    return [*messages, _locate("instruction", "user", question)]


def _locate(location: str, role: str, text: Any) -> tuple[str, Message]:
    return location, {"role": role, "content": check_text(text, location)}


def _parse_role(role: Any, location: str) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(
            f"{location}: expected a role, one of {', '.join(ROLES)}, got {role!r:.40}"
        )
    return ROLES[role]


def check_text(text: Any, location: str) -> str:
    """Return the text, "" for None. InputError: another type, or text that UTF-8 cannot encode."""
    if text is None:
        return ""
    check_unicode(_check_type(text, str, location, "text"), location)
    return text


def _check_type(value: Any, kind: type[T], location: str, expected: str) -> T:
    if not isinstance(value, kind):
        raise InputError(f"{location}: expected {expected}, got {type(value).__name__}")
    return value


def _parse_json(text: str, error: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # nested too deep
        raise InputError(f"{error} as JSON, got {text!r:.60}") from None


def parse_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the row's ``"tools"`` (a list or its JSON), or None."""
    tools = row.get("tools")
    if not tools and row.get("functions"):  # the older form
        functions = _check_type(row["functions"], list, "functions", "a list")
        return [{"type": "function", "function": function} for function in functions]
    if isinstance(tools, str):
        tools = _parse_json(tools, "tools: expected a list") if tools.strip() else None
    return _check_type(tools, list, "tools", "a list") if tools else None


read_conversations = partial(read_examples, parse=parse_conversation)
