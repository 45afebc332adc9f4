"""Grade answers by a judge, and store its replies."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.judge.api_judge import ApiJudge
from fastlm.evals.judge.items import JudgeItem, hash_json
from fastlm.evals.judge.model_judge import ModelJudge
from fastlm.evals.judge.reply import JudgeReply, LanguageJudge
from fastlm.evals.judge.rubric import TIE, A, B, Rubric
from fastlm.evals.judge.scale import Grade
from fastlm.evals.results import RecordFile
from fastlm.evals.suite import model_id
from fastlm.pipeline.stage import is_address
from fastlm.progress import Track, silent
from fastlm.sources.document import ignore_message

CHUNK = 64  # prompts whose replies are written at once
SWAPPED = {A: B, B: A, TIE: TIE}


@dataclass(frozen=True)
class GradedItem:
    """An item with the judge's replies: one, or those to both orders of a pair.

    replies: of a pair, the second one is about the answers in the other order.
    grade: of a pair, the grade in both orders, or a tie if the two differ (Zheng et al. 2023,
        arXiv:2306.05685). "A" is the first answer of the item. None: a reply has no grade.
    """

    item: JudgeItem
    replies: tuple[JudgeReply, ...]

    @property
    def grades(self) -> tuple[Grade | None, ...]:
        """The grade of each reply, of the answers in the item's order."""
        grades = [reply["grade"] for reply in self.replies]
        return (grades[0], *(SWAPPED[g] if isinstance(g, str) else g for g in grades[1:]))

    @property
    def grade(self) -> Grade | None:
        grades = self.grades
        if None in grades:
            return None
        return grades[0] if len(set(grades)) == 1 else TIE

    @property
    def is_consistent(self) -> bool:
        return len(set(self.grades)) == 1

    def as_row(self) -> dict[str, Any]:
        row = {**self.item.as_row(), "grade": self.grade}
        if len(self.replies) == 1:
            return {**row, **self.replies[0]}
        return {**row, "consistent": self.is_consistent, "replies": list(self.replies)}

    @property
    def probability(self) -> float | None:
        """The judge's smallest probability of a grade that it gave; None where it is not known."""
        values = [reply["probability"] for reply in self.replies]
        return min((value for value in values if value is not None), default=None)


class JudgeSource:
    """A judge that is opened at its first question, so that stored replies need none.

    Args:
        judge: a model as for `fastlm.model.load.load_model`, or the address of a server.
        judge_model: the name of the server's model; None: the first that it lists.

    exposes_key: the key goes to the server without encryption, through a network that is not
        private.
    """

    def __init__(
        self, judge: str, judge_model: str | None, max_reason_tokens: int, timeout: float,
        retries: int,
    ) -> None:  # fmt: skip
        self.is_server = is_address(judge)
        self._judge: LanguageJudge | None = None
        self._open: Callable[[], LanguageJudge] = lambda: ModelJudge(judge, max_reason_tokens)
        if self.is_server:
            api = ApiJudge(judge, judge_model, timeout, retries)
            self._judge, self.exposes_key = api, api.exposes_key
            self.id = {"address": api.address, "model": api.model}
        else:
            self.exposes_key = False
            self.id = {"model": model_id(judge), "max_reason_tokens": max_reason_tokens}

    def reply(
        self, prompts: Sequence[str], grades: Sequence[Grade]
    ) -> Iterable[tuple[int, JudgeReply]]:
        if self._judge is None:
            self._judge = self._open()
        return self._judge.reply(prompts, grades)


class ReplyRecord(JudgeReply):
    """The reply to a prompt, of which it has a hash. A later one to the same prompt replaces it."""

    prompt: str


def grade_items(
    items: Sequence[JudgeItem],
    rubric: Rubric,
    judge: JudgeSource,
    folder: Path,
    *,
    track: Track = silent,
    warn: Callable[[str], None] = ignore_message,
) -> list[GradedItem]:
    """Grade all items. Both orders of a pair are asked; equal prompts are asked once. Replies are
    stored in a file in ``folder``, named after the judge. A later call asks only for those that are
    missing, and a server for those without a grade; if it fails with these, the call only warns.

    InputError: no item has a grade; what the judge raises.
    """
    prompts: dict[str, str] = {}  # by hash
    keys: list[list[str]] = []  # of the prompts of each item
    for item in items:
        answers = item.answer_messages
        orders = [answers] if len(answers) == 1 else [answers, answers[::-1]]
        texts = [rubric.prompt(item.conversation, answers) for answers in orders]
        keys.append([hash_json([rubric.grades, text]) for text in texts])
        prompts |= zip(keys[-1], texts)
    metadata = {"judge": judge.id}
    path = folder / f"replies-{hash_json(metadata)}.jsonl"
    with RecordFile(path, metadata, ReplyRecord) as file:

        def ask(missing: Sequence[str]) -> None:
            starts = range(0, len(missing), CHUNK)
            for start in track(starts, "judging", unit="chunks") if starts else ():
                chunk, replies = missing[start : start + CHUNK], {}
                try:
                    for i, reply in judge.reply([prompts[key] for key in chunk], rubric.grades):
                        replies[i] = {"prompt": chunk[i], **reply}
                finally:
                    file.add([replies[i] for i in sorted(replies)])

        stored = _replies(file)
        ask([key for key in prompts if key not in stored])
        if judge.is_server:
            try:
                ask([k for k in prompts if k in stored and stored[k]["grade"] is None])
            except InputError as error:
                warn(f"asked again for missing grades: {error}")
        replies = _replies(file)
    graded = [
        GradedItem(item, tuple(replies[key] for key in item_keys))
        for item, item_keys in zip(items, keys, strict=True)
    ]
    if all(g.grade is None for g in graded):
        error = next(replies[key].get("error") for key in prompts if replies[key]["grade"] is None)
        raise InputError(f"judge: expected a readable grade, got none: {error}")
    return graded


def _replies(file: RecordFile) -> dict[str, JudgeReply]:
    """Return the last reply to each prompt, by the prompt's hash."""
    replies: dict[str, Any] = {}
    for record in file.records:
        replies[record["prompt"]] = {k: v for k, v in record.items() if k != "prompt"}
    return replies
