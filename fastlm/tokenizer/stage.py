"""The stage that trains a tokenizer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastlm.runs.stage import Facts, Job, Stage, Takes, at_least_one


@dataclass(frozen=True)
class TrainTokenizer(Stage):
    """Train a byte-level BPE tokenizer."""

    kind = "tokenizer"
    command = ("tokenizer", "train")
    reads = {
        "corpus": Takes(
            ("corpus",), "Text: files, folders, packages, train.jsonl.zst or a prepared folder",
            several=True, positional=True,
        ),
    }  # fmt: skip
    leaves = {"tokenizer": "."}
    result = {"vocab_size": int}

    vocab_size: Annotated[int, "Size of the vocabulary"] = 32768
    train_bytes: Annotated[int, "Train on at most this many bytes of text"] = 1 << 26

    def check(self) -> None:
        from fastlm.tokenizer.tokenizer import SPECIAL_TOKENS, check_vocab_size

        check_vocab_size(self.vocab_size, SPECIAL_TOKENS)
        at_least_one(self, "train_bytes")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        del inputs
        return {"vocab_size": self.vocab_size}

    def run(self, job: Job) -> dict[str, Any]:
        from functools import partial

        from fastlm.tokenizer.tokenizer import Tokenizer

        def texts() -> Iterator[str]:
            left = self.train_bytes
            for text in self._all_texts(job):
                if left <= 0:
                    return
                yield text
                left -= len(text.encode())

        track = partial(job.track, total=self._expected(job))
        tokenizer = Tokenizer.train(texts(), self.vocab_size, track=track)
        tokenizer.chat_template = None  # a base model continues text; fine-tuning adds one
        tokenizer.save(job.out)
        return {"vocab_size": tokenizer.vocab_size}

    def _all_texts(self, job: Job) -> Iterator[str]:
        from fastlm.evals.texts import read_texts

        for source in job.inputs["corpus"]:
            yield from read_texts(source.where, part="train", cache=job.cache, tell=job.skipped)

    def _expected(self, job: Job) -> int | None:
        """Return how many documents will be counted, None unless all sources are
        prepared folders.
        """
        from fastlm.data.prepare import FUNNEL, Funnel

        count = 0
        for source in job.inputs["corpus"]:
            if not (source.path / FUNNEL).is_file():
                return None
            (step,) = (s for s in Funnel.load(source.path).steps if s["step"] == "train")
            count += math.ceil(step["documents"] * min(1.0, self.train_bytes / step["bytes"]))
        return count

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        return f"{job.out}: {result['vocab_size']:,} tokens"
