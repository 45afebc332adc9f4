"""Read conversations: rows of JSON in the shapes that data sets for fine-tuning have, checked, and
brought to one form.

Rows come from .jsonl and .json files (an array of rows), local or in packages
(`fastlm.data.sources`). The shape is recognised by a row's keys:

- OpenAI: ``{"messages": [{"role", "content"}, ...], "tools"?}``; an assistant message with
  ``"weight": 0`` is context and not learnt;
- ShareGPT: ``{"conversations": [{"from", "value"}, ...], "system"?, "tools"?}``;
- Alpaca: ``{"instruction", "input"?, "output", "system"?, "history"?}``;
- pairs: ``{"prompt", "completion"}`` (or ``"response"``), each a text or a list of messages.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.sources import (
    NAMED_LINES,
    SourceFile,
    ignore,
    list_files,
    read_rows,
    row_unit,
)
from fastlm.errors import InputError

# Who may speak after whom; None is the beginning
NEXT = {
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
SHAPES = (
    "messages (OpenAI), conversations (ShareGPT), instruction and output (Alpaca), or prompt and"
    " completion"
)


@dataclass(slots=True)
class Conversation:
    """``messages``: role, content and what else a chat template reads ("tool_calls", ...). The
    last one is the assistant's. ``learnt``: per message, whether the model is to learn it.
    ``place``: file and line, for error messages.
    """

    messages: list[dict[str, Any]]
    learnt: list[bool]
    place: str
    tools: list[Any] | None = None

    def key(self) -> str:
        """The content as text: equal conversations have equal keys."""
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True)


@dataclass
class Rows:
    """How many rows were read, and how many left out, by reason."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def read_conversations(
    sources: Sequence[str],
    *,
    cache: Path,
    skip_bad: bool = False,
    rows: Rows | None = None,
    tell: Callable[[str], None] = ignore,
) -> Iterator[Conversation]:
    """Yield the conversations of all sources, in order.

    A row that cannot be used is an error that names its file and line. With ``skip_bad`` it is
    counted in ``rows.skipped`` and left out, and the first ones of a file are told; a file of only
    bad rows is an error all the same.

    InputError: also a source that is missing or has no file of JSON rows.
    """
    rows = Rows() if rows is None else rows
    for spec in sources:
        files, _ = list_files(spec, cache=cache)
        files = [file for file in files if file.format in ("jsonl", "json")]
        if not files:
            raise InputError(f"source {spec}: wanted .jsonl or .json files, got none")
        for file in files:
            yield from _read_file(file, skip_bad, rows, tell)


def _read_file(
    file: SourceFile, skip_bad: bool, rows: Rows, tell: Callable[[str], None]
) -> Iterator[Conversation]:
    good = bad = 0
    first: InputError | None = None
    for number, row in read_rows(file):
        rows.read += 1
        place = f"{file.path}, {row_unit(file)} {number}"
        try:
            if isinstance(row, InputError):
                raise row
            conversation = conversation_of(row, place)
        except InputError as error:
            refusal = InputError(f"{place}: {error}")
            if not skip_bad:
                raise refusal from None
            bad += 1
            first = first or refusal
            rows.skipped["malformed"] += 1
            if bad <= NAMED_LINES:
                tell(str(refusal))
            continue
        good += 1
        yield conversation
    if first is not None and not good:
        raise first
    if bad > NAMED_LINES:
        tell(f"{file.path}: {bad - NAMED_LINES:,} more of its {good + bad:,} rows")


def conversation_of(row: Any, place: str = "") -> Conversation:
    """The conversation that a row holds. InputError: the row has none of the shapes, an empty
    message, a role that is unknown or out of order, or no answer at the end.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"wanted an object with {SHAPES}, got {type(row).__name__}")
    if "messages" in row:
        messages = _openai(row["messages"], "messages")
    elif "conversations" in row:
        messages = [
            *_system(row.get("system")),
            *(_sharegpt(turn, f"conversations[{i}]") for i, turn in _listed(row, "conversations")),
        ]
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row)
    elif "prompt" in row and ("completion" in row or "response" in row):
        messages = _pair(row, "completion" if "completion" in row else "response")
    else:
        keys = ", ".join(map(repr, row))[:200] or "no keys"
        raise InputError(f"wanted an object with {SHAPES}, got {keys}")
    weights = [message.pop("weight", 1) for message in messages]
    check_messages(messages)
    for i, weight in enumerate(weights):
        if weight not in (0, 1):
            raise InputError(f"messages[{i}]: wanted a weight of 0 or 1, got {weight!r:.40}")
    learnt = [m["role"] == "assistant" and w == 1 for m, w in zip(messages, weights)]
    if not any(learnt):
        raise InputError("wanted an assistant message to learn, all have weight 0")
    return Conversation(messages, learnt, place, _tools(row.get("tools")))


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """InputError unless roles are in order, no message is empty and the assistant has the last
    word.
    """
    before = None
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in NEXT[before]:
            after = f"after {before}" if before else "first"
            raise InputError(
                f"messages[{i}]: wanted {' or '.join(NEXT[before])} {after}, got {role}"
            )
        if not message["content"].strip() and not message.get("tool_calls"):
            raise InputError(f"messages[{i}]: wanted text from the {role}, got an empty message")
        before = role
    if before != "assistant":
        raise InputError(f"messages: wanted an answer at the end, got {before or 'no message'}")


def _openai(messages: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise InputError(f"{name}: wanted a list of messages, got {type(messages).__name__}")
    found = []
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: wanted an object, got {type(message).__name__}")
        content = message.get("content")
        if isinstance(content, list):  # parts, as in requests to an API
            content = "".join(_text_part(part, where) for part in content)
        rest = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
        found.append({
            "role": _role(message.get("role"), where), "content": _text(content, where), **rest,
        })  # fmt: skip
    if found and found[0]["role"] == "system" and not found[0]["content"].strip():
        found = found[1:]
    return found


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        got = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InputError(f"{where}: wanted parts of type 'text', got {got!r:.40}")
    return _text(part.get("text", part.get("value")), where)


def _sharegpt(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: wanted an object, got {type(turn).__name__}")
    name = turn.get("from", turn.get("role"))
    role, text = _role(name, where), _text(turn.get("value", turn.get("content")), where)
    message: dict[str, Any] = {"role": role, "content": text}
    if name == "function_call":
        try:
            call = json.loads(text)
        except ValueError:
            call = None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise InputError(f"{where}: wanted a call as JSON with a name, got {text!r:.60}")
        message |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    if "weight" in turn:
        message["weight"] = turn["weight"]
    return message


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = _system(row.get("system"))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InputError(f"history: wanted a list of pairs, got {type(history).__name__}")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"history[{i}]: wanted [question, answer], got {pair!r:.60}")
        for role, text in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": _text(text, f"history[{i}]")})
    texts = [_text(row[key], key) for key in ("instruction", "input") if row.get(key)]
    messages.append({"role": "user", "content": "\n\n".join(t for t in texts if t.strip())})
    messages.append({"role": "assistant", "content": _text(row["output"], "output")})
    return messages


def _pair(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    messages = _system(row.get("system"))
    for name, role in (("prompt", "user"), (key, "assistant")):
        value = row[name]
        if isinstance(value, list):
            messages += _openai(value, name)
        else:
            messages.append({"role": role, "content": _text(value, name)})
    return messages


def _system(text: Any) -> list[dict[str, Any]]:
    if text is None or text == "":
        return []
    return [{"role": "system", "content": _text(text, "system")}]


def _listed(row: Mapping[str, Any], key: str) -> Iterator[tuple[int, Any]]:
    if not isinstance(row[key], list):
        raise InputError(f"{key}: wanted a list of turns, got {type(row[key]).__name__}")
    return enumerate(row[key])


def _role(role: Any, where: str) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: wanted a role, one of {', '.join(ROLES)}, got {role!r:.40}")
    return ROLES[role]


def _text(text: Any, where: str) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: wanted text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: wanted valid Unicode, got a lone surrogate at {error.start}"
        ) from None
    return text


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError:
            raise InputError(f"tools: wanted JSON, got {tools!r:.60}") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise InputError(f"tools: wanted a list, got {type(tools).__name__}")
    return tools
