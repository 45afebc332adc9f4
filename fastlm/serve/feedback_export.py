"""Feedback as rows to train on: for `fastlm sft`, `dpo` and `reward`, and `kto`.

Of several opinions of one rater about one answer, or about two answers, the last counts. An opinion
about an answer whose text nobody consented to keep trains nothing and is counted.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.conversations import conversation_of
from fastlm.data.forgotten import PROVENANCE
from fastlm.data.preferences import Comparison, Label, preference_of
from fastlm.errors import InputError
from fastlm.files import replacing
from fastlm.serve.feedback import FeedbackStore, Kept, Opinion
from fastlm.serve.withdrawn import is_withdrawn

FORMS = ("sft", "preferences", "kto")
Key = tuple[str, int]


@dataclass
class Exported:
    """How many rows were written, and how many opinions were left out, by reason."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def export(store: FeedbackStore, path: str | Path, form: str) -> Exported:
    """Write a .jsonl file. ``form``:

    - "sft": conversations that end in a correction, or in an answer with a thumb up that nobody
      gave a thumb down and nobody corrected; `read_conversations` reads them;
    - "preferences": each picked answer with each one that it was picked over, and each correction
      with what it corrects; `read_preferences` reads them;
    - "kto": answers with a thumb, desirable or not; `read_preferences` reads them.

    InputError: nothing to export.
    """
    if form not in FORMS:
        raise InputError(f"form: wanted one of {', '.join(FORMS)}, got {form!r}")
    done = Exported()
    read = conversation_of if form == "sft" else preference_of
    with replacing(Path(path)) as file:
        seen = set()
        for row, responses in _Export(store, done).rows(form):
            line = json.dumps(row, ensure_ascii=False)
            if line in seen:
                continue
            seen.add(line)
            row |= _provenance(responses)
            line = json.dumps(row, ensure_ascii=False)
            try:
                read(row)
            except InputError as error:
                done.left_out[f"no row to train on: {error}"] += 1
                continue
            file.write(line.encode() + b"\n")
            done.rows += 1
        if not done.rows:
            why = "".join(f"; {count} {reason}" for reason, count in done.left_out.items())
            raise InputError(f"{store.name}: wanted feedback to export as {form}, got none{why}")
    return done


def _provenance(answers: Sequence[Kept]) -> dict[str, Any]:
    """What a row says of where it is from, by which `fastlm data forget` finds it."""
    responses = dict.fromkeys(answer.response_id for answer in answers)
    talks = dict.fromkeys(a.conversation_id for a in answers if a.conversation_id is not None)
    return {PROVENANCE: {"responses": [*responses], "conversations": [*talks]}}


class _Export:
    def __init__(self, store: FeedbackStore, done: Exported):
        self.done, gone = done, store.withdrawn()
        self.answers = {
            id: answer
            for id, answer in store.answers().items()
            if not is_withdrawn(gone, id, answer.conversation_id)
        }
        self.thumbs: dict[tuple[str | None, Key], str] = {}
        self.corrections: dict[tuple[str | None, Key], str] = {}
        self.picks: dict[tuple[str | None, frozenset[Key]], tuple[Key, Key]] = {}
        for opinion in store.opinions():
            self._sort(opinion)

    def _sort(self, opinion: Opinion) -> None:
        if opinion.response_id is None:  # about a conversation: nothing says which answer
            return
        key = (opinion.response_id, opinion.choice)
        if opinion.thumb:
            self.thumbs[opinion.rater, key] = opinion.thumb
        if opinion.corrected:
            self.corrections[opinion.rater, key] = opinion.corrected
        for worse in opinion.preferred_over:
            self.picks[opinion.rater, frozenset((key, worse))] = key, worse

    def rows(self, form: str) -> Iterator[tuple[dict[str, Any], list[Kept]]]:
        """Each row with the answers that it is made of."""
        if form == "kto":
            for (rater, key), thumb in self.thumbs.items():
                if found := self._answer(key):
                    answer, messages = found
                    label = Label(answer.prompt, messages, thumb == "up", answer.tools, rater)
                    yield label.row(), [answer]
            return
        for (rater, key), text in self.corrections.items():
            if found := self._answer(key):
                answer, messages = found
                fixed = [*messages[:-1], {"role": "assistant", "content": text}]
                pair = self._pair(answer, fixed, messages, rater)
                row = pair.demonstration().row() if form == "sft" else pair.row()
                yield row, [answer]
        if form == "sft":
            yield from self._liked()
            return
        for (rater, _), (better, worse) in self.picks.items():
            chosen, rejected = self._answer(better), self._answer(worse)
            if chosen and rejected:
                if (chosen[0].prompt, chosen[0].tools) != (rejected[0].prompt, rejected[0].tools):
                    self.done.left_out["of answers to different prompts"] += 1
                    continue
                pair = self._pair(chosen[0], chosen[1], rejected[1], rater)
                yield pair.row(), [chosen[0], rejected[0]]

    def _liked(self) -> Iterator[tuple[dict[str, Any], list[Kept]]]:
        disliked = {key for (_, key), thumb in self.thumbs.items() if thumb == "down"}
        corrected = {key for _, key in self.corrections}
        for key in dict.fromkeys(key for (_, key), thumb in self.thumbs.items() if thumb == "up"):
            if key not in disliked and key not in corrected and (found := self._answer(key)):
                answer, messages = found
                pair = self._pair(answer, messages, messages, None)
                yield pair.demonstration().row(), [answer]

    def _pair(
        self, answer: Kept, better: list[Any], worse: list[Any], rater: str | None
    ) -> Comparison:
        return Comparison(answer.prompt, (better, worse), (0, 1), tools=answer.tools, rater=rater)

    def _answer(self, key: Key) -> tuple[Kept, list[Any]] | None:
        answer = self.answers.get(key[0])
        if answer is None:
            self.done.left_out["of answers whose text was not kept"] += 1
            return None
        if key[1] >= len(answer.choices):
            self.done.left_out["of choices that the answer does not have"] += 1
            return None
        return answer, answer.choices[key[1]]
