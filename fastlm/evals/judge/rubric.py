"""Rubrics: what a judge reads about an answer or a pair of answers, and the grades it may give."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.evals.judge.items import REFERENCE
from fastlm.evals.judge.scale import Grade, Scale
from fastlm.files import read_text
from fastlm.pipeline.text import message_text

PASS, FAIL, TIE = "pass", "fail", "tie"
A, B = "A", "B"  # the first and the second answer of a pair
GRADES: dict[Scale, tuple[Grade, ...]] = {
    "pass": (PASS, FAIL),
    "1-5": (1, 2, 3, 4, 5),
    "1-10": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    "pair": (A, B, TIE),
}
assert set(GRADES) == set(get_args(Scale))
THRESHOLDS: dict[Scale, int] = {"1-5": 4, "1-10": 7}  # the lowest grade that passes, by default
MAX_RUBRIC_BYTES = 2**16
TEXTS: dict[Scale, str] = {
    "pass": "You judge an assistant's answer to the last message of a conversation. The answer"
    " passes if it does what the message asks, its facts are right and its language is clear. It"
    " fails if it is wrong, off topic, incomplete or garbled, or if it repeats itself.",
    "1-5": "You judge an assistant's answer to the last message of a conversation. Grades: 5 is"
    " right, complete and clear. 4 has small faults. 3 is partly right or incomplete. 2 is mostly"
    " wrong or hardly helps. 1 is wrong, off topic or garbled, or repeats itself.",
    "1-10": "You judge an assistant's answer to the last message of a conversation. Look at how"
    " helpful, relevant, right, deep and detailed it is. Grades: 10 is right, complete and clear. 7"
    " or 8 has small faults. 5 or 6 is partly right or incomplete. 3 or 4 is mostly wrong or hardly"
    " helps. 1 or 2 is wrong, off topic or garbled, or repeats itself.",
    "pair": "You compare two assistants' answers, A and B, to the last message of a conversation."
    " The better answer does more of what the message asks, with right facts and in clear"
    " language. Neither the order of the answers nor their length makes one better. Say tie if"
    " they are equally good or equally bad.",
}
REFERENCE_NOTE = (
    "The reference is a right answer to the last message. Other words, or another way to the same"
    " result, are right, too. An answer that contradicts it is wrong."
)
SEPARATE_TURNS = (
    "The conversation continues differently for the two assistants: conversation_a and"
    " conversation_b."
)
REPLY = (
    'Reply with one line of JSON with two keys: "reason", your reason in one or two sentences, and'
    ' "grade", one of'
)


@dataclass(frozen=True)
class Rubric:
    """What a judge is to look at.

    threshold: on the scales 1-5 and 1-10, the lowest grade that passes.
    """

    scale: Scale
    text: str
    threshold: int

    @classmethod
    def read(cls, scale: Scale, path: str | None, threshold: int | None = None) -> "Rubric":
        """Return the rubric with the text of a file, or with the default text of the scale.
        ``threshold``: None is that of `THRESHOLDS`."""
        text = TEXTS[scale]
        if path is not None:
            text = read_text(Path(path), MAX_RUBRIC_BYTES).strip()
            if not text:
                raise InputError(f"rubric: expected a text in {path}, got an empty file")
        return cls(scale, text, THRESHOLDS.get(scale, 4) if threshold is None else threshold)

    @property
    def grades(self) -> tuple[Grade, ...]:
        return GRADES[self.scale]

    @property
    def key(self) -> str:
        """A short hash of scale and text, which ties labels to the rubric."""
        text = json.dumps([self.scale, self.text])
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def prompt(self, messages: Sequence[Message], answers: Sequence[Sequence[Message]]) -> str:
        """Return what the judge reads. The rubric comes first, so that all prompts share their
        beginning in the engine's prefix cache.

        messages: the conversation, as in `JudgeItem.conversation`.
        answers: one, or two to compare, as in `JudgeItem.answer_messages`.
        """
        parts = {"conversation": _transcript(messages)}
        letters = ("",) if len(answers) == 1 else ("_a", "_b")
        for letter, (*earlier, answer) in zip(letters, answers, strict=True):
            if earlier:
                parts[f"conversation{letter}"] = _transcript(earlier)
            parts[f"answer{letter}"] = message_text(answer)
        notes = [REFERENCE_NOTE] if any(m["role"] == REFERENCE for m in messages) else []
        notes += [SEPARATE_TURNS] if parts.keys() & {"conversation_a", "conversation_b"} else []
        blocks = [f"<{name}>\n{text}\n</{name}>" for name, text in parts.items()]
        grades = ", ".join(map(json.dumps, self.grades))
        return "\n\n".join([self.text, f"{REPLY} {grades}.", *notes, *blocks])

    def passes(self, grade: Grade) -> bool:
        """Return whether a grade of a single answer passes."""
        return grade >= self.threshold if isinstance(grade, int) else grade == PASS

    def as_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "text": self.text, "threshold": self.threshold}


def _transcript(messages: Sequence[Message]) -> str:
    return "\n".join(f"{m['role']}: {message_text(m)}" for m in messages)
