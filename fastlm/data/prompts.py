"""Read the prompt of a row: ``"prompt"`` or ``"question"`` (a text or messages), ``"messages"``
(OpenAI), ``"conversations"`` (ShareGPT), or ``"instruction"`` and ``"input"`` (Alpaca).

A text ``"passage"`` is put before a ``"question"`` that is a text (BoolQ, ASDiv). The other fields
of a row ("answer", ...) are passed to the reward function.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastlm.data.conversations import (
    LocatedMessages,
    Message,
    add_system,
    check_messages,
    check_text,
    describe_keys,
    parse_alpaca_prompt,
    parse_messages,
    parse_tools,
    prompt_key,
    read_examples,
)
from fastlm.errors import InputError

DIALOGUE = re.compile(r"\n\n(Human|Assistant):")  # the turns of HH-RLHF
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """``messages``: the last one is a user's or a tool's. ``row``: as it was read. ``location``:
    file and line, for error messages.
    """

    messages: list[Message]
    row: Mapping[str, Any]
    tools: list[Any] | None = None
    location: str = ""

    def key(self) -> str:
        """Return the prompt as text, equal for equal prompts."""
        return prompt_key(self.messages)


def parse_prompt(
    row: Any, location: str = "", *, may_be_empty: Collection[str] = ("tool",)
) -> Prompt:
    """Parse the prompt of a row, or the messages of a conversation before its last answer.
    InputError: no prompt, roles out of order, an empty message (except of the roles
    ``may_be_empty``).
    """
    values = {k: v for k, v in row.items() if v is not None} if isinstance(row, Mapping) else {}
    messages = parse_prompt_messages(values)
    if messages is None:
        got = describe_keys(values) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(f"expected an object with a prompt or messages, got {got}")
    add_system(values, messages)
    if messages and messages[-1][1]["role"] == "assistant":
        messages.pop()
    answer = ("the answer", {"role": "assistant", "content": "any"})
    check_messages([*messages, answer], may_be_empty)
    return Prompt(strip_locations(messages), row, parse_tools(values), location)


def parse_prompt_messages(row: Mapping[str, Any]) -> LocatedMessages | None:
    """Return the row's prompt, not yet checked; None if it has none."""
    for key in ("prompt", "question", "messages", "conversations"):
        if key in row:
            value = row[key]
            if isinstance(value, list) or key in ("messages", "conversations"):
                return parse_messages(value, key)
            text = check_text(value, key)
            if messages := parse_dialogue(text, key):
                return messages
            passage = row.get("passage") if key == "question" else None
            if isinstance(passage, str) and (passage := check_text(passage, "passage").strip()):
                text = f"{passage}\n\n{text}"
            return [(key, {"role": "user", "content": text})]
    return parse_alpaca_prompt(row) if "instruction" in row else None


def parse_dialogue(text: str, name: str) -> LocatedMessages | None:
    """Parse the turns of a text of HH-RLHF; None for another text. An empty last turn stands for
    the answer.
    """
    before, *parts = DIALOGUE.split(text)
    if before.strip() or not parts:
        return None
    if not parts[-1].strip():
        parts = parts[:-2]
    return [
        (f"{name}, turn {i}", {"role": SPEAKERS[speaker], "content": content.strip()})
        for i, (speaker, content) in enumerate(zip(parts[::2], parts[1::2]), 1)
    ]


def strip_locations(messages: LocatedMessages) -> list[Message]:
    """Return the messages without locations and weights: the model is trained on the answer."""
    dropped = ("weight", "loss_weight")
    return [{k: v for k, v in message.items() if k not in dropped} for _, message in messages]


read_prompts = partial(read_examples, parse=parse_prompt)
