"""What a judge replies, and the interface of judges."""

from collections.abc import Iterable, Sequence
from typing import NotRequired, Protocol

from typing_extensions import TypedDict

from fastlm.evals.judge.scale import Grade
from fastlm.schema import Finite


class JudgeReply(TypedDict):
    """The reply to a prompt.

    grade: None if there is no readable one; ``error`` then says why.
    probability: of the grade among all grades, by the judge; None where it is not known.
    """

    grade: Grade | None
    reason: str
    probability: Finite | None
    error: NotRequired[str]


class LanguageJudge(Protocol):
    """A language model that grades answers."""

    def reply(
        self, prompts: Sequence[str], grades: Sequence[Grade]
    ) -> Iterable[tuple[int, JudgeReply]]:
        """Return a reply to each prompt with one of ``grades``: the prompt's index and the reply,
        in any order."""
        ...


def no_grade(error: str) -> JudgeReply:
    return {"grade": None, "reason": "", "probability": None, "error": error}
