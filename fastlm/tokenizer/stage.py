"""The stages that train a tokenizer and turn text into its tokens."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastlm.data.corpus import SPLITS, UNFINISHED_SHARDS, is_corpus
from fastlm.errors import InputError
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    ReportSection,
    Stage,
    StageContext,
    at_least_one,
    one_of,
)  # fmt: skip
from fastlm.pipeline.text import count_text, size_text

LOCK_FOLDER = ".writing"  # in the folder of shards, while a process writes them


@dataclass(frozen=True)
class TrainTokenizer(Stage):
    """Train a byte-level BPE tokenizer."""

    kind = "tokenizer"
    command = ("tokenizer", "train")
    inputs = {
        "corpus": InputSpec(
            ("corpus",), "Text: files, folders, packages, a prepared folder or a split of it",
            several=True, positional=True,
        ),
    }  # fmt: skip
    outputs = {"tokenizer": "."}
    result = {"vocab_size": int}

    vocab_size: Annotated[int, "Train a vocabulary of this size"] = 32768
    train_bytes: Annotated[int, "Train on at most this many bytes of text"] = 1 << 26

    def check(self) -> None:
        from fastlm.tokenizer.tokenizer import SPECIAL_TOKENS, check_vocab_size

        check_vocab_size(self.vocab_size, SPECIAL_TOKENS)
        at_least_one(self, "train_bytes")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        del inputs
        return {"vocab_size": self.vocab_size}

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.data.texts import read_texts
        from fastlm.tokenizer.tokenizer import Tokenizer

        def texts() -> Iterator[str]:
            remaining = self.train_bytes
            for source in ctx.inputs["corpus"]:
                documents = read_texts(
                    source.source, split="train", cache=ctx.cache_dir, on_skip=ctx.skipped
                )
                for text in documents:
                    if remaining <= 0:
                        return
                    yield text
                    remaining -= len(text.encode())

        track = partial(ctx.track, total=self._num_documents(ctx))
        tokenizer = Tokenizer.train(texts(), self.vocab_size, track=track)
        tokenizer.chat_template = None  # a base model continues text; fine-tuning adds one
        tokenizer.save(ctx.out)
        return {"vocab_size": tokenizer.vocab_size}

    def _num_documents(self, ctx: StageContext) -> int | None:
        """Return the number of documents to read, or None unless all are in prepared folders."""
        count = 0
        for source in ctx.inputs["corpus"]:
            if not is_corpus(source.path):
                return None
            (step,) = (s for s in Funnel.load(source.path).steps if s["step"] == "train")
            count += math.ceil(step["documents"] * min(1.0, self.train_bytes / step["bytes"]))
        return count

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        return f"{ctx.out}: {result['vocab_size']:,} tokens"


@dataclass(frozen=True)
class Shards(Stage):
    """Turn prepared text into the token shards that training reads."""

    kind = "shards"
    command = ("data", "shards")
    inputs = {
        "corpus": InputSpec(
            ("corpus",), "A prepared folder, a split of it, or one .jsonl.zst file", positional=True
        ),
        "tokenizer": InputSpec(
            ("tokenizer",), "Folder, tokenizer.json or .gguf file of a tokenizer", flag="t"
        ),
    }
    outputs = {"shards": "."}
    resumable = tuple(f"{name}/{UNFINISHED_SHARDS}" for name in (*SPLITS, "."))
    result = {"vocab_size": int, "train_tokens": int, "train_bytes": int}

    workers: Annotated[int, "Encode in this many processes; one uses all threads"] = 1
    executor: Annotated[str, "Run the processes here (pool) or on a cluster (ray)"] = "pool"

    def check(self) -> None:
        from fastlm.pipeline.executors import EXECUTORS

        at_least_one(self, "workers")
        one_of(self, executor=EXECUTORS)

    def identity(self) -> dict[str, Any]:
        return {}  # the shards are the same for every number of workers

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        (words,) = inputs["tokenizer"]
        return {**words, "tokenizer": words["name"]}

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.files import make_folder
        from fastlm.pipeline.units import Work

        corpus = ctx.path("corpus")
        if is_corpus(ctx.out):  # whose record.json would be replaced
            raise InputError(f"out: expected a folder without prepared text, got {ctx.out}")
        with Work(make_folder(ctx.out) / LOCK_FOLDER).locked():
            return self._write(corpus, ctx)

    def _write(self, corpus: Path, ctx: StageContext) -> dict[str, Any]:
        from fastlm.data.shards import INDEX
        from fastlm.files import remove
        from fastlm.tokenizer.corpus_encoding import encode_corpus

        result: dict[str, Any] = {}
        splits = {"train": ctx.out}  # and their folders
        counts: dict[str, int] = {}
        if is_corpus(corpus):
            counts = {s["step"]: s["documents"] for s in Funnel.load(corpus).steps}
            splits = {split: ctx.out / split for split in SPLITS}
        for split, folder in splits.items():
            if counts and not counts.get(split):
                # the index of another text, which may be in the training part now
                (folder / INDEX).unlink(missing_ok=True)
                continue
            info = encode_corpus(
                corpus, split, ctx.path("tokenizer"), folder,
                executor=self.executor, workers=self.workers, keep_work=True, track=ctx.track,
            )  # fmt: skip
            result["vocab_size"] = info.vocab_size
            result |= {
                f"{split}_tokens": info.tokens, f"{split}_bytes": info.bytes_of_text,
                f"{split}_documents": info.documents,
            }  # fmt: skip
        for folder in splits.values():
            remove(folder / UNFINISHED_SHARDS)
        return result

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        counts = [
            f"{result[f'{part}_tokens']:,} tokens of {result[f'{part}_documents']:,} documents"
            f" for {purpose}"
            for part, purpose in (("train", "training"), ("heldout", "evaluation"))
            if f"{part}_tokens" in result
        ]
        return f"{ctx.out}: {', '.join(counts)}"

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        del ctx
        facts = {"vocabulary": f"{result['vocab_size']:,}"}
        for part, purpose in (("train", "training text"), ("heldout", "held-out text")):
            if tokens := result.get(f"{part}_tokens"):
                size = result[f"{part}_bytes"]
                mean = f"{size / tokens:.2f} bytes per token"
                facts[purpose] = f"{count_text(tokens)} tokens, {size_text(size)}, {mean}"
        return ReportSection("Tokens", facts=facts)
