"""Answers to judge: rows of a prompt and one answer, or two answers to compare."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fastlm.data.conversations import Message, check_text, describe_keys, prompt_key, read_examples
from fastlm.data.prompts import Prompt, parse_prompt
from fastlm.errors import InputError

NAMES = ("answer", "answer_b")  # of the answers in a row


@dataclass(frozen=True)
class JudgeItem:
    """A prompt and its answers: one, or two to compare.

    id: a hash of both, by which labels find the item.
    """

    id: str
    messages: list[Message]
    answers: tuple[str, ...]
    tools: list[Any] | None = None

    @property
    def conversation(self) -> list[Message]:
        """What judges and raters read of the prompt: the definitions of tools, and the messages."""
        if not self.tools:
            return self.messages
        tools = json.dumps(self.tools, ensure_ascii=False)
        return [{"role": "tools", "content": tools}, *self.messages]

    @property
    def prompt_key(self) -> str:
        return prompt_key(self.messages)

    def as_row(self) -> dict[str, Any]:
        row = {"id": self.id, "prompt": self.messages, **dict(zip(NAMES, self.answers))}
        return {**row, "tools": self.tools} if self.tools else row


def make_items(rows: Iterable[tuple[Prompt, tuple[str, ...]]]) -> list[JudgeItem]:
    """Return an item per row. Equal rows have different ids: a sample may have an answer twice."""
    occurrences: Counter[str] = Counter()
    items = []
    for prompt, answers in rows:
        tools = [prompt.tools] if prompt.tools else []
        text = json.dumps([prompt.key(), *answers, *tools], ensure_ascii=False)
        occurrences[text] += 1
        digest = blake2b(f"{occurrences[text]}/{text}".encode(), digest_size=8).hexdigest()
        items.append(JudgeItem(digest, prompt.messages, answers, prompt.tools))
    return items


def read_items(sources: Sequence[str], *, cache: Path) -> list[JudgeItem]:
    """Read rows with a prompt (`fastlm.data.prompts`), "answer", and in pairs "answer_b".
    InputError: a bad row, no row, or some rows with one answer and some with two."""
    rows = list(read_examples(sources, _parse_row, cache=cache))
    if not rows:
        raise InputError(f"answers: expected rows with an answer, got none in {', '.join(sources)}")
    counts = {len(answers) for _, answers in rows}
    if len(counts) > 1:
        raise InputError('answers: expected "answer_b" in all rows or in none, got both')
    return make_items(rows)


def _parse_row(row: Any, location: str) -> tuple[Prompt, tuple[str, ...]]:
    prompt = parse_prompt(row, location)
    if "answer" not in row:
        raise InputError(f'expected an object with a prompt and "answer", got {describe_keys(row)}')
    names = [name for name in NAMES if row.get(name) is not None]
    return prompt, tuple(check_text(row[name], name) for name in names)
