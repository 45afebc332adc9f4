"""Encode rows of text as examples: what all trainings on conversations, preferences and prompts
share.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastlm.errors import InputError
from fastlm.sources.source_files import MAX_REPORTED_ROWS as NAMED
from fastlm.train.objective import Example, Mixture

if TYPE_CHECKING:
    from fastlm.data.conversations import Conversation
    from fastlm.pipeline.stage import StageContext
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.training_stage import ChatStage


class KeyedRow(Protocol):
    """A row of data with a key that identifies its prompt."""

    def key(self) -> str: ...


def hash_fraction(row: KeyedRow) -> float:
    """Return a number in [0, 1) from a hash of the prompt. Rows below `heldout` are held out. So
    the split of a row does not depend on other rows, and rows with the same prompt are in one
    split.
    """
    digest = hashlib.sha256(row.key().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def chat_tokenizer(tokenizer: "Tokenizer", chat_template: str) -> "Tokenizer":
    """Give the tokenizer the chat template to train with: the file ``chat_template``, its own, or
    ChatML.
    """
    from fastlm.files import read_text
    from fastlm.tokenizer.chat_template import CHATML

    if chat_template:
        tokenizer.chat_template = read_text(Path(chat_template))
    elif tokenizer.chat_template is None:
        if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens:
            raise InputError(
                "chat_template: expected one, since the model has neither a template nor"
                " ChatML's tokens <|im_start|> and <|im_end|>, got none"
            )
        tokenizer.chat_template = CHATML
    tokenizer.check_can_train_on_chats()
    return tokenizer


def check_vocabulary(name: str, tokenizer: "Tokenizer", reference: "Tokenizer") -> None:
    """Raise InputError with the first difference, unless both tokenizers have the same tokens."""
    for i in range(max(tokenizer.vocab_size, reference.vocab_size)):
        expected, got = (
            t.token_bytes(i) if i < t.vocab_size else None for t in (reference, tokenizer)
        )
        if expected != got:
            raise InputError(
                f"{name}: expected the vocabulary of the trained model, in which token {i} is"
                f" {expected!r}, got one in which it is {got!r}"
            )


def decode_text(tokenizer: "Tokenizer", tokens: Sequence[int]) -> str:
    """Decode the tokens of an answer. An id beyond the tokenizer's vocabulary (the model's may be
    padded) becomes the replacement character.
    """
    parts = [
        tokenizer.decode(run) if in_vocabulary else "\N{REPLACEMENT CHARACTER}"
        for in_vocabulary, run in groupby(tokens, key=lambda token: token < tokenizer.vocab_size)
    ]
    return "".join(parts)


def template_variables(tools: list[Any] | None) -> dict[str, Any]:
    """Return the variables of the chat template for these tools."""
    return {} if tools is None else {"tools": tools}


class EncodedDataset:
    """The rows of a stage's data as tokens: ``training`` examples, and ``heldout`` examples of
    ``heldout_rows`` rows, in the order of `hash_fraction`.

    A subclass defines `read`, `prompt_of` and `encode`. A row that the chat template refuses is an
    error, or with `skip_bad` is counted. ``context``: the maximum tokens of a prompt and its
    sample.
    """

    def __init__(
        self,
        stage: "ChatStage",
        tokenizer: "Tokenizer",
        max_length: int,
        context: int,
        ctx: "StageContext",
    ):
        from fastlm.data.conversations import RowCounts

        self.stage, self.tokenizer, self.ctx = stage, tokenizer, ctx
        self.max_length, self.context = max_length, context
        self.rows, self.refused, self.heldout_rows = RowCounts(), 0, 0
        self.training: list[Any] = []
        self.sample_rows: list[tuple[float, Any]] = []  # with their fractions
        self.sample_row: Any = None  # that of `sample_prompt`
        heldout: list[tuple[float, Any]] = []
        for row in ctx.track(self.read(), f"reading {stage.row_name}", unit=stage.row_name):
            examples = self.encode(row)
            if not examples:
                continue
            fraction = hash_fraction(self.prompt_of(row)[0])
            # keep the lowest fractions: those of held-out rows come first
            self.sample_rows.append((fraction, row))
            self.sample_rows = sorted(self.sample_rows, key=lambda pair: pair[0])[:8]
            if fraction < stage.heldout:
                self.heldout_rows += 1
                heldout += [(fraction, example) for example in examples]
            else:
                self.add_training(examples)
        if self.refused > NAMED:
            ctx.skipped(f"{self.refused - NAMED:,} more rows that the chat template refuses")
        self.heldout = [example for _, example in sorted(heldout, key=lambda pair: pair[0])]

    def read(self) -> Iterator[Any]:
        """Yield the rows."""
        raise NotImplementedError

    def reader_options(self) -> dict[str, Any]:
        """Return the arguments of the functions that read rows."""
        return {
            "cache": self.ctx.cache_dir, "skip_bad": self.stage.skip_bad, "rows": self.rows,
            "on_skip": self.ctx.skipped,
        }  # fmt: skip

    def prompt_of(self, row: Any) -> tuple[KeyedRow, list[dict[str, Any]], list[Any] | None]:
        """Return the row with the prompt's key, the prompt's messages and its tools."""
        raise NotImplementedError

    def prompt_of_message(self, text: str) -> tuple[Any, list[dict[str, Any]], list[Any] | None]:
        """Return what `prompt_of` returns, for a user's message."""
        return None, [{"role": "user", "content": text}], None

    def encode(self, row: Any) -> Sequence[Any]:
        """Return the examples of a row, none if the row is left out."""
        raise NotImplementedError

    def add_training(self, examples: Sequence[Any]) -> None:
        """Add the examples of a row that is not held out."""
        self.training += examples

    def mixture(self) -> Mixture:
        """Return how often an epoch takes the examples of each source."""
        return Mixture((len(self.training),), (1.0,))

    def encode_messages(self, conversation: "Conversation") -> list[Example]:
        """Encode the conversation (`Tokenizer.encode_conversation`). Return [] if the template
        refuses it.
        """
        import numpy as np

        variables = template_variables(conversation.tools)
        location = conversation.location
        try:
            encoded = self.tokenizer.encode_conversation(
                conversation.messages, conversation.loss_mask, date=self.stage.date, **variables
            )
        except InputError as error:
            self.refuse(error, location)
            return []
        return [Example(np.array(ids, np.int32), np.array(mask), location) for ids, mask in encoded]

    def refuse(self, error: InputError, location: str) -> None:
        """Raise the error with its location, or with `skip_bad` count the row."""
        refusal = InputError(f"{location}: {error}")
        if not self.stage.skip_bad:
            raise refusal from None
        self.rows.by_reason["refused by the chat template"] += 1
        self.refused += 1
        if self.refused <= NAMED:
            self.ctx.skipped(str(refusal))

    def sample_prompt(self) -> tuple[list[int], str]:
        """Return ids and text of the prompt that samples answer: the stage's, or the first that is
        short enough.
        """
        prompt, tokens = self.stage.sample_prompt, self.stage.sample_tokens
        max_tokens = self.context - tokens
        rows = map(self.prompt_of, (row for _, row in self.sample_rows))
        for row, messages, tools in [self.prompt_of_message(prompt)] if prompt else rows:
            variables = template_variables(tools)
            ids = self.tokenizer.encode_chat(messages, date=self.stage.date, **variables)
            if len(ids) <= max_tokens:
                self.sample_row = row
                return ids, messages[-1]["content"]
        if prompt and tokens:
            raise InputError(
                f"sample_prompt: expected at most {max_tokens} tokens, so that sample_tokens"
                f" {tokens} fit into the context, got more"
            )
        return [], ""

    def summary(self) -> str:
        """Say how many rows were read, and why some are not trained on."""
        reasons = [f"{self.heldout_rows:,} held out"] if self.heldout_rows else []
        reasons += [format_counts(self.rows.by_reason)] if self.rows.by_reason else []
        rows = f"{self.rows.total:,} rows"
        return f"{rows} ({', '.join(reasons)})" if reasons else rows


def format_counts(counts: Mapping[str, int]) -> str:
    """Write the counts of rows by reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def rows_summary(result: Mapping[str, Any], training: str = "") -> str:
    """Summarize the rows that were read, for a report. ``training``: the training examples."""
    used = f": {training} for training" if training else ""
    rows = f"{result['rows_read']:,} rows{used}, {result['heldout']:,} held out"
    return f"{rows}; {format_counts(result['counts'])}" if result["counts"] else rows
