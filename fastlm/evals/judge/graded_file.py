"""Read the grades that ``fastlm judge`` wrote, to label answers."""

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.judge.grading import GradedItem
from fastlm.evals.judge.items import JudgeItem
from fastlm.evals.judge.reply import JudgeReply
from fastlm.evals.judge.rubric import Rubric
from fastlm.evals.judge.scale import Grade, Scale
from fastlm.evals.judge.stage import GRADES, SCORES
from fastlm.schema import Finite, read_document, read_lines


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
