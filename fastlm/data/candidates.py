"""The prompt of a row and the answers to it, as messages: the part that rows of preferences have in
common (`fastlm.data.preferences`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.data.conversations import (
    Message,
    Placed,
    add_system,
    alpaca_prompt,
    check_messages,
    said,
    text_of,
    turns_of,
)
from fastlm.errors import InputError

DIALOGUE = re.compile(r"\n\n(Human|Assistant):")  # the turns of HH-RLHF
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def candidates(
    row: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[list[Message], list[list[Message]]]:
    """The prompt of a row and its answers. ``given``: the answers by the names of their places.

    Answers that are whole conversations are cut after their common beginning, which must begin
    with the prompt if there is one.
    """
    prompt = prompt_messages(row)
    answers = {name: _answer(value, name, prompt is None) for name, value in given.items()}
    whole = [name for name, answer in answers.items() if answer[0][1]["role"] in ("system", "user")]
    if len(whole) == len(answers) and len(answers) > 1:
        begin = _common(list(answers.values()))
        common = next(iter(answers.values()))[:begin]
        if prompt is not None and not _begins(common, prompt):
            raise InputError(
                f"prompt: wanted the beginning of {' and '.join(answers)}, got another one"
            )
        prompt, answers = common, {name: answer[begin:] for name, answer in answers.items()}
    elif whole:
        raise InputError(f"{whole[0]}: wanted an answer by the assistant, got a conversation")
    elif prompt is None:
        raise InputError(f"wanted a prompt beside {' and '.join(answers)}, got {keys_of(row)}")
    add_system(row, prompt)
    for name, answer in answers.items():
        if not answer:
            raise InputError(f"{name}: wanted an answer that differs from the others, got none")
        check_messages([*prompt, *answer])
        for where, message in answer:
            if message["role"] not in ("assistant", "tool"):
                raise InputError(
                    f"{where}: wanted one prompt for all answers, got a {message['role']}'s message"
                    " after they differ"
                )
    return plain(prompt), [plain(answer) for answer in answers.values()]


def prompt_messages(row: Mapping[str, Any]) -> Placed | None:
    """The row's prompt, not checked yet; None if it has none. A text ``passage`` precedes a
    ``question`` that is a text and no dialogue; in other rows it is not read.
    """
    for key in ("prompt", "question", "messages", "conversations"):
        if key in row:
            value = row[key]
            if isinstance(value, list) or key in ("messages", "conversations"):
                return turns_of(value, key)
            text = text_of(value, key)
            if placed := _dialogue(text, key):
                return placed
            passage = row.get("passage") if key == "question" else None
            if isinstance(passage, str) and (passage := text_of(passage, "passage").strip()):
                text = f"{passage}\n\n{text}"
            return [(key, {"role": "user", "content": text})]
    return alpaca_prompt(row) if "instruction" in row else None


def _answer(value: Any, name: str, whole: bool) -> Placed:
    """An answer, or a conversation. ``whole``: there is no prompt, so a text has to be one."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise InputError(f"{name}: wanted an answer, got no message")
        return turns_of(value, name)
    text = text_of(value, name)
    if whole and (placed := _dialogue(text, name)):
        return placed
    return [(name, {"role": "assistant", "content": text})]


def _dialogue(text: str, name: str) -> Placed | None:
    """The turns of a text of HH-RLHF, None if it is no such text. A last turn that is empty asks
    for the answer.
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


def _common(answers: Sequence[Placed]) -> int:
    """How many messages all conversations begin with."""
    columns = zip(*(said([message for _, message in placed]) for placed in answers))
    same = 0
    for first, *others in columns:
        if any(other != first for other in others):
            break
        same += 1
    return same


def _begins(messages: Placed, beginning: Placed) -> bool:
    """Whether messages begin with others; only one of the two may have a system message."""
    a, b = (said([m for _, m in placed]) for placed in (messages, beginning))
    if a[:1] != b[:1]:
        a, b = ([m for m in x if m[0] != "system"] for x in (a, b))
    return a[: len(b)] == b


def plain(placed: Placed) -> list[Message]:
    """The messages without their places and weights: what is learnt is the answer."""
    dropped = ("weight", "loss_weight")
    return [{k: v for k, v in message.items() if k not in dropped} for _, message in placed]


def keys_of(row: Mapping[str, Any]) -> str:
    """The keys of a row, for an error message."""
    return ", ".join(map(repr, row))[:200] or "no keys"
