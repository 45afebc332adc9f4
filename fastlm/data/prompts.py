"""Read prompts to answer: the questions of any rows that `conversations` or `preferences` read.

A row has ``"prompt"`` or ``"question"`` (a text or messages), or is a conversation, of which the
messages before the first answer are the prompt. Whatever else it holds ("answer", ...) is handed to
the reward function.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data.conversations import (
    Message,
    Rows,
    add_system,
    check_messages,
    conversation_of,
    messages_of,
    read_examples,
    said,
    text_of,
    tools_of,
)
from fastlm.data.sources import ignore
from fastlm.errors import InputError

ASKED = ("prompt", "question")  # keys


@dataclass(frozen=True, slots=True)
class Prompt:
    """``messages``: the last one is a user's or a tool's. ``row``: as it was read. ``place``: file
    and line, for error messages.
    """

    messages: list[Message]
    row: Mapping[str, Any]
    tools: list[Any] | None = None
    place: str = ""

    def key(self) -> str:
        """The prompt as text: equal for equal prompts."""
        return json.dumps(said(self.messages), ensure_ascii=False, sort_keys=True)


def read_prompts(
    sources: Sequence[str],
    *,
    cache: Path,
    skip_bad: bool = False,
    rows: Rows | None = None,
    tell: Callable[[str], None] = ignore,
) -> Iterator[Prompt]:
    """Yield the prompts of all sources, in order (`fastlm.data.conversations.read_examples`)."""
    return read_examples(sources, prompt_of, cache=cache, skip_bad=skip_bad, rows=rows, tell=tell)


def prompt_of(row: Any, place: str = "") -> Prompt:
    """The prompt that a row holds. InputError: it has none, an empty message, roles that are out
    of order.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"wanted an object with a prompt, got {type(row).__name__}")
    key = next((key for key in ASKED if row.get(key)), None)
    if key is None:
        conversation = conversation_of(row, place)
        return Prompt(conversation.prompt(), row, conversation.tools, place)
    asked = row[key]
    if isinstance(asked, list):
        placed = messages_of(asked, key)
    else:
        placed = [(key, {"role": "user", "content": text_of(asked, key)})]
    add_system(row, placed)
    answer = ("the answer", {"role": "assistant", "content": "."})
    check_messages([*placed, answer])  # an answer may follow
    return Prompt([message for _, message in placed], row, tools_of(row), place)
