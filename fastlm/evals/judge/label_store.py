"""The answers that people label, as a rater sees them: for ``fastlm label`` in a terminal and on a
page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.evals.judge.grading import SWAPPED
from fastlm.evals.judge.items import JudgeItem
from fastlm.evals.judge.labels import LabelFile
from fastlm.evals.judge.rubric import Rubric
from fastlm.evals.judge.scale import Grade
from fastlm.pipeline.rater_terminal import check_rater


@dataclass(frozen=True)
class LabelItem:
    """A prompt and its answers, in the order in which the rater sees them. In a later turn of a
    pair, an answer begins with the model's own earlier turns. is_swapped: the second answer of a
    pair comes first."""

    id: str
    prompt: list[Message]
    answers: tuple[list[Message], ...]
    is_swapped: bool


@dataclass
class LabelCounts:
    """How many items a rater labelled and skipped."""

    labelled: int = 0
    skipped: int = 0


class LabelStore:
    """Items to label, in the order in which raters are asked, and the file of their labels.

    A rater never sees a judge's grade. The order of a pair's answers is a coin flip, the same in
    every session of the rater.
    """

    def __init__(self, items: Sequence[JudgeItem], rubric: Rubric, path: Path) -> None:
        self.items = {item.id: item for item in items}
        self.rubric = rubric
        self.file = LabelFile(path, rubric)

    def item(self, id: str, rater: str) -> LabelItem:
        """Return the item with this id, as the rater sees it."""
        item = self.items.get(id)
        if item is None:
            raise InputError(f"item: expected one of the answers to label, got {id!r:.80}")
        coin = blake2b(json.dumps([rater, id]).encode()).digest()[0] % 2
        is_swapped = len(item.answers) == 2 and coin == 1
        answers = item.answer_messages
        return LabelItem(
            id, item.conversation, tuple(answers[::-1] if is_swapped else answers), is_swapped
        )

    def next_item(self, rater: str) -> LabelItem | None:
        """Return the first item that the rater has not labelled or skipped. None: there is none."""
        labels = self.file.read()
        id = next((id for id in self.items if (id, rater) not in labels), None)
        return None if id is None else self.item(id, rater)

    def progress(self, rater: str) -> tuple[LabelCounts, int]:
        """Return (the counts of the rater, the number of items)."""
        check_rater(rater)
        labels = self.file.read()
        entered = [labels[id, rater] for id in self.items if (id, rater) in labels]
        skipped = entered.count(None)
        return LabelCounts(len(entered) - skipped, skipped), len(self.items)

    def label(self, rater: str, item: LabelItem, label: Grade) -> None:
        """Store a label. Of a pair, A is the answer that the rater sees first."""
        check_rater(rater)
        grades = self.rubric.grades
        if label not in grades or isinstance(label, bool):
            expected = ", ".join(map(str, grades))
            raise InputError(f"label: expected one of {expected}, got {label!r:.80}")
        if item.is_swapped:
            label = SWAPPED[str(label)]
        self.file.add(rater, item.id, label)

    def skip(self, rater: str, item: LabelItem) -> None:
        """Store that the rater skipped the item."""
        check_rater(rater)
        self.file.add(rater, item.id, None)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "LabelStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
