"""Rubrics: what a judge reads about an answer or a pair of answers, and the grades it may give."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from fastlm.errors import InputError
from fastlm.evals.judge.scale import Grade, Scale
from fastlm.files import read_text
from fastlm.pipeline.text import message_text

PASS, FAIL, TIE = "pass", "fail", "tie"
A, B = "A", "B"  # the first and the second answer of a pair
GRADES: dict[Scale, tuple[Grade, ...]] = {
    "pass": (PASS, FAIL),
    "1-5": (1, 2, 3, 4, 5),
    "pair": (A, B, TIE),
}
assert set(GRADES) == set(get_args(Scale))
MAX_RUBRIC_BYTES = 2**16
TEXTS: dict[Scale, str] = {
    "pass": "You judge an assistant's answer to the last message of a conversation. The answer"
    " passes if it does what the message asks, its facts are right and its language is clear. It"
    " fails if it is wrong, off topic, incomplete or garbled, or if it repeats itself.",
    "1-5": "You judge an assistant's answer to the last message of a conversation. Grades: 5 is"
    " right, complete and clear. 4 has small faults. 3 is partly right or incomplete. 2 is mostly"
    " wrong or hardly helps. 1 is wrong, off topic or garbled, or repeats itself.",
    "pair": "You compare two assistants' answers, A and B, to the last message of a conversation."
    " The better answer does more of what the message asks, with right facts and in clear"
    " language. Neither the order of the answers nor their length makes one better. Say tie if"
    " they are equally good or equally bad.",
}
REPLY = (
    'Reply with one line of JSON with two keys: "reason", your reason in one or two sentences, and'
    ' "grade", one of'
)


@dataclass(frozen=True)
class Rubric:
    """What a judge is to look at.

    threshold: on the scale 1-5, the lowest grade that passes.
    """

    scale: Scale
    text: str
    threshold: int

    @classmethod
    def read(cls, scale: Scale, path: str | None, threshold: int) -> "Rubric":
        """Return the rubric with the text of a file, or with the default text of the scale."""
        text = TEXTS[scale]
        if path is not None:
            text = read_text(Path(path), MAX_RUBRIC_BYTES).strip()
            if not text:
                raise InputError(f"rubric: expected a text in {path}, got an empty file")
        return cls(scale, text, threshold)

    @property
    def grades(self) -> tuple[Grade, ...]:
        return GRADES[self.scale]

    @property
    def key(self) -> str:
        """A short hash of scale and text, which ties labels to the rubric."""
        text = json.dumps([self.scale, self.text])
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def prompt(self, messages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> str:
        """Return what the judge reads. The rubric comes first, so that all prompts share their
        beginning in the engine's prefix cache."""
        names = ("answer",) if len(answers) == 1 else ("answer_a", "answer_b")
        conversation = "\n".join(f"{m['role']}: {message_text(m)}" for m in messages)
        parts = {"conversation": conversation, **dict(zip(names, answers, strict=True))}
        blocks = [f"<{name}>\n{text}\n</{name}>" for name, text in parts.items()]
        grades = ", ".join(map(json.dumps, self.grades))
        return "\n\n".join([self.text, f"{REPLY} {grades}.", *blocks])

    def passes(self, grade: Grade) -> bool:
        """Return whether a grade of the scales "pass" and "1-5" passes."""
        return grade >= self.threshold if isinstance(grade, int) else grade == PASS

    def as_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "text": self.text, "threshold": self.threshold}
