"""Answers to judge: rows of a prompt and one answer, or two answers to compare.

The answer to each turn of a conversation is an item of its own.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fastlm.data.conversations import (
    Message,
    check_text,
    describe_keys,
    message_contents,
    prompt_key,
    read_examples,
)
from fastlm.data.prompts import parse_prompt
from fastlm.errors import InputError
from fastlm.evals.chat_questions import ChatQuestion, parse_reference

NAMES = ("answer", "answer_b")  # of the answers in a row
FIELDS = ("tools", "prompt_b", "reference", "category", "question_id")  # that a row may lack
MAY_BE_EMPTY = ("tool", "assistant")  # a model's earlier answer may be empty
REFERENCE = "reference"  # the role of a right answer among the messages


@dataclass(frozen=True)
class JudgeItem:
    """A prompt and its answers: one, or two to compare.

    id: a hash of both, by which labels find the item.
    prompt_b: what the second answer follows, if that is another conversation: in a later turn each
        model has its own answers before. Its beginning is the same.
    reference: a right answer, "" if there is none.
    turn: the number of the turn that the answers are to, 1 for the first.
    question_id: of the conversation. The answers to all its turns are a cluster. "": the prompt
        is a question of its own.
    """

    id: str
    messages: list[Message]
    answers: tuple[str, ...]
    tools: list[Any] | None = None
    prompt_b: list[Message] | None = None
    reference: str = ""
    category: str = ""
    turn: int = 1
    question_id: str = ""

    @property
    def conversation(self) -> list[Message]:
        """What judges and raters read first: the definitions of tools, the reference, and the
        messages before the answers, as far as they are those of both."""
        context = []
        if self.tools:
            tools = json.dumps(self.tools, ensure_ascii=False)
            context.append({"role": "tools", "content": tools})
        if self.reference:
            context.append({"role": REFERENCE, "content": self.reference})
        return [*context, *self.messages[: self._shared]]

    @property
    def answer_messages(self) -> list[list[Message]]:
        """What follows the `conversation`, for each answer: the model's own earlier turns, and the
        answer."""
        prompts = (self.messages, self.prompt_b or self.messages)
        return [
            [*prompt[self._shared :], {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, self.answers)
        ]

    @property
    def _shared(self) -> int:
        """The number of messages that are those of both answers."""
        if self.prompt_b is None:
            return len(self.messages)
        pairs = [*zip(self.messages, self.prompt_b)]
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    @property
    def cluster(self) -> str:
        return self.question_id or prompt_key(self.messages)

    def as_row(self) -> dict[str, Any]:
        row = {"id": self.id, "prompt": self.messages, **dict(zip(NAMES, self.answers))}
        row |= {name: value for name in FIELDS if (value := getattr(self, name))}
        return {**row, "turn": self.turn} if self.question_id or self.turn > 1 else row


def make_items(items: Iterable[JudgeItem]) -> list[JudgeItem]:
    """Return the items with their ids. Equal ones have different ids: a sample may have an answer
    twice."""
    occurrences: Counter[str] = Counter()
    result = []
    for item in items:
        other = [message_contents(item.prompt_b)] if item.prompt_b else []
        tools = [item.tools] if item.tools else []
        text = json.dumps(
            [prompt_key(item.messages), *item.answers, *tools, *other], ensure_ascii=False
        )
        occurrences[text] += 1
        digest = blake2b(f"{occurrences[text]}/{text}".encode(), digest_size=8).hexdigest()
        result.append(replace(item, id=digest))
    return result


def conversation_items(question: ChatQuestion, answers: Sequence[Sequence[str]]) -> list[JudgeItem]:
    """Return an item per turn of a question. ``answers``: of each model, one per turn."""
    question_id = hash_json([question.key(), question.prompt.tools]) if question.turns else ""
    items = []
    for turn in range(1 + len(question.turns)):
        prompt, *other = (question.messages(texts[:turn]) for texts in answers)
        items.append(
            JudgeItem(
                "", prompt, tuple(texts[turn] for texts in answers), question.prompt.tools,
                other[0] if other and other[0] != prompt else None, question.reference(turn),
                question.category, turn + 1, question_id,
            )
        )  # fmt: skip
    return items


def hash_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def read_items(sources: Sequence[str], *, cache: Path) -> list[JudgeItem]:
    """Read rows with a prompt (`fastlm.data.prompts`), "answer", and in pairs "answer_b". A row may
    have the other fields of grades.jsonl, too ("reference", "category", "prompt_b", ...).
    InputError: a bad row, no row, or some rows with one answer and some with two."""
    rows = list(read_examples(sources, _parse_row, cache=cache))
    if not rows:
        raise InputError(f"answers: expected rows with an answer, got none in {', '.join(sources)}")
    counts = {len(item.answers) for item in rows}
    if len(counts) > 1:
        raise InputError('answers: expected "answer_b" in all rows or in none, got both')
    return make_items(rows)


def _parse_row(row: Any, location: str) -> JudgeItem:
    prompt = parse_prompt(row, location, may_be_empty=MAY_BE_EMPTY)
    if "answer" not in row:
        raise InputError(f'expected an object with a prompt and "answer", got {describe_keys(row)}')
    answers = [check_text(row[name], name) for name in NAMES if row.get(name) is not None]
    prompt_b = None
    if row.get("prompt_b") is not None:
        if len(answers) < 2:
            raise InputError('expected "answer_b" with "prompt_b", got none')
        prompt_b = parse_prompt(
            {"prompt": row["prompt_b"]}, location, may_be_empty=MAY_BE_EMPTY
        ).messages
        if prompt_b[0] != prompt.messages[0]:
            raise InputError("prompt_b: expected the first message of the prompt, got another")
    references = parse_reference(row)
    if len(references) > 1:
        raise InputError(f"reference: expected one, got {len(references)}")
    turn = 1 if row.get("turn") is None else row["turn"]
    if type(turn) is not int or turn < 1:
        raise InputError(f"turn: expected 1 or more, got {turn!r:.40}")
    category = check_text(row.get("category"), "category")
    question_id = row.get("question_id")
    if question_id is not None and type(question_id) not in (str, int):
        raise InputError(f"question_id: expected text or a whole number, got {question_id!r:.40}")
    return JudgeItem(
        "", prompt.messages, tuple(answers), prompt.tools, prompt_b, "".join(references), category,
        turn, "" if question_id is None else check_text(str(question_id), "question_id"),
    )  # fmt: skip
