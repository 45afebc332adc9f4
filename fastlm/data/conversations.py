"""Read conversations: rows of JSON in the shapes that data sets for fine-tuning have, checked, and
brought to one form.

Rows come from .jsonl and .json files (an array of rows), local or in packages
(`fastlm.data.sources`). The shape is recognised by a row's keys:

- OpenAI: ``{"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?}``; an assistant
  message with ``"weight": 0`` is context and not learnt;
- ShareGPT: ``{"conversations": [{"from", "value"}, ...], "tools"?}``;
- Alpaca: ``{"instruction", "input"?, "output", "history"?}``;
- pairs: ``{"prompt", "completion"}`` (or ``"response"``), each a text or a list of messages.

Each may have a ``"system"`` text beside it.
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
from fastlm.typed import check_unicode

FORMATS = ("jsonl", "json")
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

Message = dict[str, Any]
Placed = list[tuple[str, Message]]  # messages, each with the name of its place in the row


@dataclass(slots=True)
class Conversation:
    """``messages``: role, content and what else a chat template reads ("tool_calls", ...). The
    last one is the assistant's. ``learnt``: per message, whether the model is to learn it.
    ``place``: file and line, for error messages.
    """

    messages: list[Message]
    learnt: list[bool]
    place: str
    tools: list[Any] | None = None

    def prompt(self) -> list[Message]:
        """The messages before the first answer."""
        first = next(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return self.messages[:first]

    def key(self) -> str:
        """The prompt as text: conversations that begin with the same questions have equal keys."""
        said = [[m["role"], m["content"], m.get("tool_calls")] for m in self.prompt()]
        return json.dumps(said, ensure_ascii=False, sort_keys=True)


@dataclass
class Rows:
    """How many rows were read; how many were left out or changed, by reason."""

    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)


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
    counted in ``rows`` and left out, and the first ones of a file are told. A file of only bad rows
    is then told and left out too, unless the user named it. Files of other types in a folder are
    told.

    InputError: also a source that is missing or has no file of JSON rows.
    """
    rows = Rows() if rows is None else rows
    for spec in sources:
        found, passed = list_files(spec, cache=cache)
        files = [file for file in found if file.format in FORMATS]
        if not files:
            raise InputError(f"source {spec}: wanted .jsonl or .json files, got none")
        del passed["not matched by the glob"]  # not wanted
        if others := len(found) - len(files) + passed.total():
            tell(f"{spec}: {others:,} files that are not read: wanted .jsonl or .json")
        for file in files:
            yield from _read_file(file, skip_bad, rows, tell)


def _read_file(
    file: SourceFile, skip_bad: bool, rows: Rows, tell: Callable[[str], None]
) -> Iterator[Conversation]:
    good = bad = 0
    first: InputError | None = None
    for number, row in _readable(file, skip_bad, rows, tell):
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
            rows.counts["malformed"] += 1
            if bad <= NAMED_LINES:
                tell(str(refusal))
            continue
        good += 1
        yield conversation
    if first is not None and not good and file.named:
        raise first
    if bad > NAMED_LINES:
        tell(f"{file.path}: {bad - NAMED_LINES:,} more of its {good + bad:,} rows")


def _readable(
    file: SourceFile, skip_bad: bool, rows: Rows, tell: Callable[[str], None]
) -> Iterator[tuple[int, Any]]:
    """The rows of a file. With ``skip_bad``, a file of a folder that cannot be read to its end is
    told and counted.
    """
    try:
        yield from read_rows(file)
    except InputError as error:
        if file.named or not skip_bad:
            raise
        rows.counts["unreadable files"] += 1
        tell(str(error))


def conversation_of(row: Any, place: str = "") -> Conversation:
    """The conversation that a row holds. InputError: the row has none of the shapes, an empty
    message, a role that is unknown or out of order, a tool call that is none, or no answer at the
    end.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"wanted an object with {SHAPES}, got {type(row).__name__}")
    if "messages" in row:
        placed = _openai(row["messages"], "messages")
    elif "conversations" in row:
        placed = _sharegpt(row["conversations"])
    elif "instruction" in row and "output" in row:
        placed = _alpaca(row)
    elif "prompt" in row and ("completion" in row or "response" in row):
        placed = _pair(row, "completion" if "completion" in row else "response")
    else:
        keys = ", ".join(map(repr, row))[:200] or "no keys"
        raise InputError(f"wanted an object with {SHAPES}, got {keys}")
    if placed and placed[0][1]["role"] == "system" and not placed[0][1]["content"].strip():
        del placed[0]
    if _text(row.get("system"), "system").strip():
        if placed and placed[0][1]["role"] == "system":
            raise InputError(f"system: wanted none beside {placed[0][0]}, got two system messages")
        placed.insert(0, ("system", {"role": "system", "content": _text(row["system"], "system")}))
    check_messages(placed)
    messages, learnt = [], []
    for where, message in placed:
        weight = message.pop("weight", 1)
        if message["role"] == "assistant" and weight not in (0, 1):
            raise InputError(f"{where}: wanted a weight of 0 or 1, got {weight!r:.40}")
        messages.append(message)
        learnt.append(message["role"] == "assistant" and weight == 1)
    if not any(learnt):
        raise InputError("wanted an assistant message to learn, all have weight 0")
    return Conversation(messages, learnt, place, _tools(row))


def check_messages(placed: Placed) -> None:
    """InputError unless roles are in order, no message but a tool's is empty and the assistant has
    the last word.
    """
    before = None
    for where, message in placed:
        role = message["role"]
        if role not in NEXT[before]:
            after = f"after {before}" if before else "first"
            raise InputError(f"{where}: wanted {' or '.join(NEXT[before])} {after}, got {role}")
        if not message["content"].strip() and not message.get("tool_calls") and role != "tool":
            raise InputError(f"{where}: wanted text from the {role}, got an empty message")
        before = role
    if before != "assistant":
        raise InputError(f"wanted an answer at the end, got {before or 'no message'}")


def _openai(messages: Any, name: str) -> Placed:
    if not isinstance(messages, list):
        raise InputError(f"{name}: wanted a list of messages, got {type(messages).__name__}")
    placed: Placed = []
    for i, given in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: wanted an object, got {type(given).__name__}")
        message = {k: v for k, v in given.items() if v is not None}
        content = message.get("content")
        if isinstance(content, list):  # parts, as in requests to an API
            content = "".join(_text_part(part, where) for part in content)
        message["role"] = _role(message.get("role"), where)
        message["content"] = _text(content, where)
        calls, older = message.pop("tool_calls", None), message.pop("function_call", None)
        calls = calls or ([{"function": older}] if older is not None else None)
        if calls:
            message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
        placed.append((where, message))
    return placed


def _tool_calls(calls: Any, where: str) -> list[Message]:
    """Calls whose arguments are objects: OpenAI has them as JSON text, which templates would quote
    a second time.
    """
    if not isinstance(calls, list):
        raise InputError(f"{where}: wanted a list, got {type(calls).__name__}")
    found = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}[{i}]: wanted a call with a name, got {call!r:.60}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}[{i}]: wanted arguments")
        if not isinstance(arguments, Mapping):
            raise InputError(f"{where}[{i}]: wanted arguments as an object, got {arguments!r:.60}")
        rest = {k: v for k, v in call.items() if k in ("id", "index") and v is not None}
        function = {"name": name, "arguments": dict(arguments)}
        found.append({**rest, "type": "function", "function": function})
    return found


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        got = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InputError(f"{where}: wanted parts of type 'text', got {got!r:.40}")
    return _text(part.get("text", part.get("value")), where)


def _sharegpt(turns: Any) -> Placed:
    """Turns under OpenAI's names."""
    if not isinstance(turns, list):
        raise InputError(f"conversations: wanted a list of turns, got {type(turns).__name__}")
    messages = []
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise InputError(f"{where}: wanted an object, got {type(turn).__name__}")
        name, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        message = {k: v for k, v in turn.items() if k not in ("from", "value")}
        message |= {"role": name, "content": text}
        if name == "function_call":
            call = _json(_text(text, where), f"{where}: wanted a call")
            message |= {"content": "", "tool_calls": [call]}
        messages.append(message)
    return _openai(messages, "conversations")


def _alpaca(row: Mapping[str, Any]) -> Placed:
    placed: Placed = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InputError(f"history: wanted a list of pairs, got {type(history).__name__}")
    for i, pair in enumerate(history):
        where = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{where}: wanted [question, answer], got {pair!r:.60}")
        for role, text in zip(("user", "assistant"), pair):
            placed.append((where, {"role": role, "content": _text(text, where)}))
    texts = [_text(row[key], key) for key in ("instruction", "input") if row.get(key)]
    question = "\n\n".join(text for text in texts if text.strip())
    placed.append(("instruction", {"role": "user", "content": question}))
    answer = _text(row["output"], "output")
    placed.append(("output", {"role": "assistant", "content": answer}))
    return placed


def _pair(row: Mapping[str, Any], key: str) -> Placed:
    placed: Placed = []
    for name, role in (("prompt", "user"), (key, "assistant")):
        value = row[name]
        if isinstance(value, list):
            found = _openai(value, name)
            if name == "prompt":  # its answers are examples
                for _, message in found:
                    message.setdefault("weight", 0)
            placed += found
        else:
            placed.append((name, {"role": role, "content": _text(value, name)}))
    return placed


def _role(role: Any, where: str) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: wanted a role, one of {', '.join(ROLES)}, got {role!r:.40}")
    return ROLES[role]


def _text(text: Any, where: str) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: wanted text, got {type(text).__name__}")
    check_unicode(text, where)
    return text


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # nested too deep
        raise InputError(f"{what} as JSON, got {text!r:.60}") from None


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if not tools and row.get("functions"):  # the older form
        functions = row["functions"]
        if not isinstance(functions, list):
            raise InputError(f"functions: wanted a list, got {type(functions).__name__}")
        return [{"type": "function", "function": function} for function in functions]
    if isinstance(tools, str):
        tools = _json(tools, "tools: wanted a list") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise InputError(f"tools: wanted a list, got {type(tools).__name__}")
    return tools
