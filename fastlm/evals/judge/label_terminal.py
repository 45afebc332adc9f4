"""Run the loop of ``fastlm label``: print an answer, read the rater's label, store it."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.evals.judge.grading import GradedItem
from fastlm.evals.judge.items import JudgeItem
from fastlm.evals.judge.labels import LabelFile, label_order
from fastlm.evals.judge.reply import JudgeReply
from fastlm.evals.judge.rubric import FAIL, PASS, TIE, A, B, Rubric
from fastlm.evals.judge.scale import Grade, Scale
from fastlm.evals.judge.stage import GRADES, SCORES
from fastlm.pipeline.rater_terminal import RaterTerminal
from fastlm.pipeline.text import visible
from fastlm.schema import Finite, read_document, read_lines

INPUTS: dict[Scale, dict[str, Grade]] = {
    "pass": {"p": PASS, "pass": PASS, "f": FAIL, "fail": FAIL},
    "1-5": {str(grade): grade for grade in range(1, 6)},
    "1-10": {str(grade): grade for grade in range(1, 11)},
    "pair": {"1": A, "2": B, "=": TIE},
}
HELPS: dict[Scale, str] = {
    "pass": "p         the answer passes\nf         the answer fails",
    "1-5": "1 to 5    your grade of the answer by the rubric above; 5 is the best",
    "1-10": "1 to 10   your grade of the answer by the rubric above; 10 is the best",
    "pair": "1         answer 1 is better\n2         answer 2 is better\n"
    "=         they are equally good or equally bad",
}
QUESTIONS: dict[Scale, str] = {
    "pass": "p or f",
    "1-5": "1 to 5",
    "1-10": "1 to 10",
    "pair": "1, 2 or =",
}


class GradeRowFields(TypedDict):
    """The fields of a row of grades.jsonl that labels need."""

    id: str
    prompt: list[dict[str, Any]]
    answer: str
    grade: Grade | None
    reason: NotRequired[str]
    probability: NotRequired[Finite | None]
    answer_b: NotRequired[str]
    tools: NotRequired[list[Any]]
    prompt_b: NotRequired[list[dict[str, Any]]]
    reference: NotRequired[str]
    replies: NotRequired[list[JudgeReply]]


class RubricFields(TypedDict):
    scale: Scale
    text: str
    threshold: int


class JudgeScores(TypedDict):
    """The field of the scores.json of ``fastlm judge`` that labels need."""

    rubric: RubricFields


def read_graded(folder: Path) -> tuple[list[GradedItem], Rubric]:
    """Read what ``fastlm judge`` wrote to a folder. InputError: another folder, a bad file."""
    if not (folder / GRADES).is_file():
        raise InputError(f"grades: expected a folder of fastlm judge with {GRADES}: {folder}")
    fields = read_document(folder / SCORES, JudgeScores)["rubric"]
    rubric = Rubric(fields["scale"], fields["text"], fields["threshold"])
    graded = []
    for number, row in read_lines(folder / GRADES, GradeRowFields):
        reply: JudgeReply = {
            "grade": row["grade"], "reason": row.get("reason", ""),
            "probability": row.get("probability"),
        }  # fmt: skip
        replies = row.get("replies", [reply])
        if any(r["grade"] not in (None, *rubric.grades) for r in replies):
            raise InputError(f"{folder / GRADES}:{number}: expected grades of {rubric.scale}")
        answers = (row["answer"], *([row["answer_b"]] if "answer_b" in row else []))
        item = JudgeItem(
            row["id"], row["prompt"], answers, row.get("tools"), row.get("prompt_b"),
            row.get("reference", ""),
        )  # fmt: skip
        graded.append(GradedItem(item, tuple(replies)))
    return graded, rubric


def label_answers(folder: Path, path: Path, rater: str, count: int) -> str:
    """Ask the rater for a label of ``count`` answers (`fastlm.evals.judge.labels.label_order`),
    without the judge's grades; return a line about what is done. Labels in ``path`` are not asked
    again.

    On a terminal an invalid input prints a line; otherwise it raises InputError.
    """
    if not rater.strip() or not rater.isprintable():
        raise InputError(f"rater: expected a name, got {rater!r:.60}")
    graded, rubric = read_graded(folder)
    items = [g.item for g in label_order(graded, rubric, count)]
    with LabelFile(path, rater, rubric) as labels:
        session = _LabelTerminal(items, labels, rubric)
        session.console.print(visible(rubric.text), markup=False)
        session.run()
        ids = {item.id for item in items}
        entered = [labels.labels[id] for id in ids & labels.labels.keys()]
    skips = entered.count(None)
    text = f", {skips:,} skipped" if skips else ""
    return f"{rater}: {len(entered) - skips:,} of {len(items):,} labelled{text}: {path}"


class _LabelTerminal(RaterTerminal[JudgeItem]):
    def __init__(self, items: Sequence[JudgeItem], labels: LabelFile, rubric: Rubric) -> None:
        super().__init__()
        self.items = {item.id: item for item in items}
        self.labels = labels
        self.scale: Scale = rubric.scale
        self.question = f"{QUESTIONS[self.scale]}, ? for help: "
        self.help = HELPS[self.scale]

    def next_item(self) -> JudgeItem | None:
        return next((i for i in self.items.values() if i.id not in self.labels.labels), None)

    def item(self, key: str) -> JudgeItem:
        return self.items[key]

    def key(self, item: JudgeItem) -> str:
        return item.id

    def title(self) -> str:
        done = len(self.items.keys() & self.labels.labels.keys())
        return f"{done + 1:,} of {len(self.items):,}"

    def messages(self, item: JudgeItem) -> tuple[list[Message], list[list[Message]]]:
        answers = item.answer_messages
        return item.conversation, answers[::-1] if self._is_swapped(item) else answers

    def skip(self, item: JudgeItem) -> None:
        self.labels.add(item.id, None)

    def enter(self, line: str, item: JudgeItem) -> bool:
        inputs = INPUTS[self.scale]
        if line not in inputs:
            raise InputError(
                f"expected {QUESTIONS[self.scale]} (? shows the commands), got {line!r:.60}"
            )
        label = inputs[line]
        if self._is_swapped(item) and label != TIE:
            label = A if label == B else B
        self.labels.add(item.id, label)
        return True

    def _is_swapped(self, item: JudgeItem) -> bool:
        """Return whether the rater sees the second answer of a pair first: a coin flip, the same in
        every session of the rater."""
        text = json.dumps([self.labels.rater, item.id])
        return len(item.answers) == 2 and blake2b(text.encode()).digest()[0] % 2 == 1
