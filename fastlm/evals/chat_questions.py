"""Questions to a chat model, of one or several turns.

A row has a prompt (`fastlm.data.prompts`), or ``"turns"``, a list of the user's messages, each of
which follows the model's answer to the one before (question.jsonl of FastChat, Zheng et al. 2023,
arXiv:2306.05685). ``"category"`` and ``"reference"``, a right answer or a list of one per turn,
are for the judge and the scores. An empty reference, or null, stands for none.

``questions:two-turn`` is written for fastlm, under its licence: 8 categories as in MT-Bench, 5
questions each, short enough for small models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastlm.data.conversations import Message, check_text, prompt_key, read_examples
from fastlm.data.prompts import Prompt, parse_prompt
from fastlm.errors import InputError

SCHEME = "questions"
SETS = {"two-turn": Path(__file__).with_name("two_turn.jsonl")}


@dataclass(frozen=True)
class ChatQuestion:
    """A prompt, and what the user says after each answer.

    turns: the user's further messages.
    references: a right answer to each turn, "" where there is none; () if no turn has one.
    """

    prompt: Prompt
    turns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    category: str = ""

    def key(self) -> str:
        """Return all messages of the user as text, equal for equal questions."""
        return prompt_key([*self.prompt.messages, *map(_user_message, self.turns)])

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """Return the conversation up to the user's message after these answers."""
        messages = list(self.prompt.messages)
        for answer, turn in zip(answers, self.turns):
            messages += [{"role": "assistant", "content": answer}, _user_message(turn)]
        return messages

    def reference(self, turn: int) -> str:
        """Return the reference of the turn with this index, "" if there is none."""
        return self.references[turn] if self.references else ""


def _user_message(text: str) -> Message:
    return {"role": "user", "content": text}


def parse_chat_question(row: Any, location: str = "") -> ChatQuestion:
    """Parse a row. InputError: as `parse_prompt`; turns or references that are no texts, or as many
    references as there are turns."""
    turns: list[str] = []
    if isinstance(row, Mapping) and row.get("turns") is not None:
        turns = _texts(row["turns"], "turns")
        if not turns or not all(text.strip() for text in turns):
            raise InputError(f"turns: expected the user's messages, got {turns!r:.80}")
        if names := {"prompt", "question", "messages", "conversations", "instruction"} & {*row}:
            raise InputError(f'expected "turns" or a prompt, got "turns" and "{min(names)}"')
        row = {**row, "prompt": [_user_message(turns[0])]}
    prompt = parse_prompt(row, location)
    references = parse_reference(row)
    count = max(1, len(turns))
    if references and len(references) != count:
        raise InputError(f"reference: expected {count}, one per turn, got {len(references)}")
    category = check_text(row.get("category"), "category")
    return ChatQuestion(prompt, tuple(turns[1:]), references, category)


def parse_reference(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the references of a row, () if there is none."""
    value = row.get("reference")
    texts = _texts(value if isinstance(value, list) else [value], "reference")
    return tuple(texts) if any(texts) else ()


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a list of texts, got {type(value).__name__}")
    return [check_text(text, f"{name}, {i}") for i, text in enumerate(value, 1)]


def question_source(spec: str) -> str:
    """Return the file of ``questions:NAME``, or another source as it is. InputError: no such
    set."""
    scheme, colon, name = spec.partition(":")
    if not colon or scheme != SCHEME:
        return spec
    if name not in SETS:
        sets = ", ".join(f"{SCHEME}:{name}" for name in SETS)
        raise InputError(f"data: expected one of {sets}, got {spec!r:.80}")
    return str(SETS[name])


read_chat_questions = partial(read_examples, parse=parse_chat_question)
