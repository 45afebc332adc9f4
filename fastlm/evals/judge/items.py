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


@dataclass(frozen=True)
class JudgeItem:
    """A prompt and its answers: one, or two to compare.

    id: a hash of both, by which labels find the item.
    """

    id: str
    messages: list[Message]
    answers: tuple[str, ...]

    @property
    def prompt_key(self) -> str:
        return prompt_key(self.messages)

    def as_row(self) -> dict[str, Any]:
        names = ("answer", "answer_b")
        return {"id": self.id, "prompt": self.messages, **dict(zip(names, self.answers))}


def make_items(rows: Iterable[tuple[list[Message], tuple[str, ...]]]) -> list[JudgeItem]:
    """Return an item per row. Equal rows have different ids: a sample may have an answer twice."""
    occurrences: Counter[str] = Counter()
    items = []
    for messages, answers in rows:
        text = json.dumps([prompt_key(messages), *answers], ensure_ascii=False)
        occurrences[text] += 1
        digest = blake2b(f"{occurrences[text]}/{text}".encode(), digest_size=8).hexdigest()
        items.append(JudgeItem(digest, messages, answers))
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


def _parse_row(row: Any, location: str) -> tuple[list[Message], tuple[str, ...]]:
    prompt: Prompt = parse_prompt(row, location)
    if "answer" not in row:
        raise InputError(f'expected an object with a prompt and "answer", got {describe_keys(row)}')
    names = [name for name in ("answer", "answer_b") if row.get(name) is not None]
    return prompt.messages, tuple(check_text(row[name], name) for name in names)
