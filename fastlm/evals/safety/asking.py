"""Ask a model, and keep what it said: each set's answers in a file that survives a kill."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.evals.results import Record, Results
from fastlm.evals.scorer import Pair, Prompt, Scorer
from fastlm.progress import silent
from fastlm.schema import Count

ANSWERS, PAIRS = 16, 256  # what is kept at once


Turns = tuple[tuple[str, str], ...]  # (message, answer) each


class AnswerRecord(TypedDict):
    answer: str
    ended: bool
    cut: NotRequired[Count]


class LogprobRecord(TypedDict):
    logprob: float
    tokens: Count
    greedy: bool | None
    cut: NotRequired[Count]


class Asked:
    """Asks the model, unless the folder has the records already.

    Args:
        folder: of the files.
        model: a hash of the model, without which records of another one could be taken for its own.
        track: as in `fastlm.pipeline.stage.Job`.

    ``cuts`` counts, by name of what was asked, the prompts that were cut at their beginning to fit
    the context.
    """

    def __init__(
        self, scorer: Scorer, folder: Path, *, model: str, seed: int = 0, track=silent
    ) -> None:
        self.scorer, self.folder, self.model = scorer, folder, model
        self.seed, self.track = seed, track
        self.cuts: dict[str, int] = {}

    @property
    def chats(self) -> bool:
        return self.scorer.tokenizer.chat_template is not None

    def answers(
        self,
        name: str,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        chat: bool = True,
        temperature: float = 0.0,
        before: Sequence[Turns] | None = None,
    ) -> list[str]:
        """Return what the model answers, through its chat template if it has one and ``chat``.

        Args:
            before: (message, answer) of the turns before each prompt. Without a template they
                stand before it as text.
        """
        chat = chat and self.chats
        if before is None:
            before = [()] * len(prompts)
        elif not chat:
            prompts = [_as_text(turns, p) for turns, p in zip(before, prompts, strict=True)]
            before = [()] * len(prompts)
        about: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "chat": chat, "temperature": temperature,
        }  # fmt: skip

        if any(before):
            about["before"] = _digest(before)

        def ask(at: int, part: Sequence[str]) -> list[Record]:
            asked = [
                Prompt(
                    text, max_new_tokens, chat=chat, seed=self.seed + at + i,
                    before=tuple(before[at + i]),
                )
                for i, text in enumerate(part)
            ]  # fmt: skip
            written = self.scorer.generate(asked, temperature=temperature)
            return [
                {"answer": one.text, "ended": one.ended, **_cut(one.truncated_prompt_tokens)}
                for one in written
            ]

        records = self.records(name, prompts, ask, AnswerRecord, size=ANSWERS, about=about)
        return [record["answer"] for record in records]

    def conversations(
        self, name: str, messages: Sequence[Sequence[str]], *, max_new_tokens: int
    ) -> list[str]:
        """Return the last answer of conversations: each has a user's messages, equally many, and
        the model's own answers in between.
        """
        before: list[Turns] = [()] * len(messages)
        answers: list[str] = []
        for turn, prompts in enumerate(zip(*messages, strict=True), 1):
            answers = self.answers(
                f"{name}.turn_{turn}", prompts, max_new_tokens=max_new_tokens, before=before
            )
            said = zip(before, prompts, answers, strict=True)
            before = [(*turns, (prompt, answer)) for turns, prompt, answer in said]
        return answers

    def logprobs(
        self, name: str, pairs: Sequence[Pair], *, chat: bool = False, greedy: bool = False
    ) -> list[Record]:
        """Return {"logprob", "tokens", "greedy"} per pair, as `Scorer.loglikelihoods`."""
        chat = chat and self.chats

        def ask(at: int, part: Sequence[Pair]) -> list[Record]:
            del at
            found = self.scorer.loglikelihoods(part, chat=chat, greedy=greedy)
            return [
                {"logprob": f.logprob, "tokens": f.tokens, "greedy": f.greedy, **_cut(f.cut)}
                for f in found
            ]

        about = {"chat": chat, "greedy": greedy}
        return self.records(name, pairs, ask, LogprobRecord, size=PAIRS, about=about)

    def records(
        self,
        name: str,
        items: Sequence[Any],
        ask: Callable[[int, Sequence[Any]], list[Record]],
        schema: type,
        *,
        size: int,
        about: Mapping[str, Any],
    ) -> list[Record]:
        """Return a record per item, of ``schema``. ``ask`` gets the index of a part's first item
        and the part.

        The file is named after all that the records depend on; another run of other options or
        another model has files of its own.
        """
        digest = _digest(items)
        about = {"cut": "counted", **about}  # records without it count none
        whole = {"model": self.model, "seed": self.seed, "items": digest, "of": len(items), **about}
        path = self.folder / f"{name}-{_digest(whole)}.jsonl"
        with Results(path, whole, schema) as results:
            found = results.fill(
                items, ask, part=size, track=lambda parts: self.track(parts, name, unit="parts")
            )
            self.cuts[name] = sum(bool(record.get("cut")) for record in found)
            return found


def _as_text(turns: Turns, prompt: str) -> str:
    said = [f"User: {message}\nAssistant: {answer}" for message, answer in turns]
    return "\n".join([*said, f"User: {prompt}\nAssistant:"])


def _cut(tokens: int) -> dict[str, int]:
    return {"cut": tokens} if tokens else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
