"""Ask a model, and keep what it said: each set's answers in a file that survives a kill."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.evals.results import Record, Results
from fastlm.evals.scorer import Pair, Prompt, Scorer
from fastlm.progress import silent

ANSWERS, PAIRS = 16, 256  # what is kept at once


class Asked:
    """Asks the model, unless the folder has the records already.

    Args:
        folder: of the files.
        model: a hash of the model, without which records of another one could be taken for its own.
        track: as in `fastlm.runs.stage.Job`.
    """

    def __init__(
        self, scorer: Scorer, folder: Path, *, model: str, seed: int = 0, track=silent
    ) -> None:
        self.scorer, self.folder, self.model = scorer, folder, model
        self.seed, self.track = seed, track

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
    ) -> list[str]:
        """Return what the model answers, through its chat template if it has one and ``chat``."""
        chat = chat and self.chats
        about = {"max_new_tokens": max_new_tokens, "chat": chat, "temperature": temperature}

        def ask(at: int, part: Sequence[str]) -> list[Record]:
            asked = [
                Prompt(text, max_new_tokens, chat=chat, seed=self.seed + at + i)
                for i, text in enumerate(part)
            ]
            written = self.scorer.generate(asked, temperature=temperature)
            return [{"answer": one.text, "ended": one.ended} for one in written]

        records = self.records(name, prompts, ask, size=ANSWERS, about=about)
        return [record["answer"] for record in records]

    def logprobs(
        self, name: str, pairs: Sequence[Pair], *, chat: bool = False, greedy: bool = False
    ) -> list[Record]:
        """Return {"logprob", "tokens", "greedy"} per pair, as `Scorer.loglikelihoods`."""
        chat = chat and self.chats

        def ask(at: int, part: Sequence[Pair]) -> list[Record]:
            del at
            found = self.scorer.loglikelihoods(part, chat=chat, greedy=greedy)
            return [{"logprob": f.logprob, "tokens": f.tokens, "greedy": f.greedy} for f in found]

        about = {"chat": chat, "greedy": greedy}
        return self.records(name, pairs, ask, size=PAIRS, about=about)

    def records(
        self,
        name: str,
        items: Sequence[Any],
        ask: Callable[[int, Sequence[Any]], list[Record]],
        *,
        size: int,
        about: Mapping[str, Any],
    ) -> list[Record]:
        """Return a record per item. ``ask`` gets the index of a part's first item and the part.

        The file is named after all that the records depend on; another run of other options or
        another model has files of its own.
        """
        digest = _digest(items)
        whole = {"model": self.model, "seed": self.seed, "items": digest, "of": len(items), **about}
        with Results(self.folder / f"{name}-{_digest(whole)}.jsonl", whole) as results:
            return results.fill(
                items, ask, part=size, track=lambda parts: self.track(parts, name, unit="parts")
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
