"""Rows of text as tokens to learn from: what all trainings on conversations, preferences and
prompts share.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastlm.errors import InputError
from fastlm.sources.rows import NAMED_LINES as NAMED
from fastlm.train.objective import Example, Mixture

if TYPE_CHECKING:
    from fastlm.data.conversations import Conversation
    from fastlm.pipeline.stage import StageContext
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.training_stage import ChatStage


class KeyedRow(Protocol):
    """A row of data that knows its prompt."""

    def key(self) -> str: ...


def hash_fraction(row: KeyedRow) -> float:
    """A number in [0, 1) from a hash of the prompt. Those below `heldout` are held out: the part
    of a row does not depend on other rows, and rows with one prompt are on one side.
    """
    found = hashlib.sha256(row.key().encode()).digest()
    return int.from_bytes(found[:8], "big") / 2**64


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
                " ChatML's tokens <|im_start|> and <|im_end|>"
            )
        tokenizer.chat_template = CHATML
    tokenizer.check_learnable()
    return tokenizer


def check_vocabulary(name: str, own: "Tokenizer", wanted: "Tokenizer") -> None:
    """InputError with the first difference, unless both tokenizers have the same tokens."""
    for i in range(max(own.vocab_size, wanted.vocab_size)):
        theirs, ours = (t.token_bytes(i) if i < t.vocab_size else None for t in (wanted, own))
        if theirs != ours:
            raise InputError(
                f"{name}: expected the vocabulary of the model that is trained, in which token {i}"
                f" is {theirs!r}, got one in which it is {ours!r}"
            )


def text_of(tokenizer: "Tokenizer", tokens: Sequence[int]) -> str:
    """The text of an answer. Ids that the model has and the tokenizer has not (a padded vocabulary)
    are the replacement character.
    """
    parts = [
        tokenizer.decode(run) if known else "\N{REPLACEMENT CHARACTER}"
        for known, run in groupby(tokens, key=lambda token: token < tokenizer.vocab_size)
    ]
    return "".join(parts)


def template_variables(tools: list[Any] | None) -> dict[str, Any]:
    return {} if tools is None else {"tools": tools}


class EncodedDataset:
    """The rows of a stage's data as tokens: ``training`` examples, and ``heldout`` ones, of
    ``held_out`` rows, in the order of `hash_fraction`.

    A subclass defines `read`, `prompt_of` and `encode`. A row that the chat template refuses is an
    error, or with `skip_bad` counted. ``context``: the most tokens of a prompt and its sample.
    """

    def __init__(
        self,
        stage: "ChatStage",
        tokenizer: "Tokenizer",
        max_length: int,
        context: int,
        ctx: "StageContext",
    ):
        from fastlm.data.conversations import Rows

        self.stage, self.tokenizer, self.ctx = stage, tokenizer, ctx
        self.max_length, self.context = max_length, context
        self.rows, self.refused, self.held_out = Rows(), 0, 0
        self.training: list[Any] = []
        self.prompts: list[tuple[float, list[dict[str, Any]], list[Any] | None]] = []
        heldout: list[tuple[float, Any]] = []
        for row in ctx.track(self.read(), f"reading {stage.rows}", unit=stage.rows):
            examples = self.encode(row)
            if not examples:
                continue
            keyed, messages, tools = self.prompt_of(row)
            place = hash_fraction(keyed)
            # the first in order, of which held-out ones come before others
            self.prompts.append((place, messages, tools))
            self.prompts = sorted(self.prompts, key=lambda prompt: prompt[0])[:8]
            if place < stage.heldout:
                self.held_out += 1
                heldout += [(place, example) for example in examples]
            else:
                self.learn(examples)
        if self.refused > NAMED:
            ctx.skipped(f"{self.refused - NAMED:,} more that the chat template refuses")
        self.heldout = [example for _, example in sorted(heldout, key=lambda pair: pair[0])]

    def read(self) -> Iterator[Any]:
        """Yield the rows."""
        raise NotImplementedError

    def reading(self) -> dict[str, Any]:
        """Return the options of the functions that read rows."""
        return {
            "cache": self.ctx.cache_dir, "skip_bad": self.stage.skip_bad, "rows": self.rows,
            "on_skip": self.ctx.skipped,
        }  # fmt: skip

    def prompt_of(self, row: Any) -> tuple[KeyedRow, list[dict[str, Any]], list[Any] | None]:
        """Return what identifies the row's prompt, its messages and its tools."""
        raise NotImplementedError

    def encode(self, row: Any) -> Sequence[Any]:
        """Return the examples of a row, none if it is left out."""
        raise NotImplementedError

    def learn(self, examples: Sequence[Any]) -> None:
        """Take the examples of a row that is not held out."""
        self.training += examples

    def mixture(self) -> Mixture:
        """Return how often an epoch takes the examples of each source."""
        return Mixture((len(self.training),), (1.0,))

    def encode_messages(self, conversation: "Conversation") -> list[Example]:
        """See `Tokenizer.encode_conversation`; [] if the template refuses."""
        import numpy as np

        variables = template_variables(conversation.tools)
        place = conversation.place
        try:
            encoded = self.tokenizer.encode_conversation(
                conversation.messages, conversation.learnt, date=self.stage.date, **variables
            )
        except InputError as error:
            self.refuse(error, place)
            return []
        return [Example(np.array(ids, np.int32), np.array(mask), place) for ids, mask in encoded]

    def refuse(self, error: InputError, place: str) -> None:
        refusal = InputError(f"{place}: {error}")
        if not self.stage.skip_bad:
            raise refusal from None
        self.rows.counts["refused by the chat template"] += 1
        self.refused += 1
        if self.refused <= NAMED:
            self.ctx.skipped(str(refusal))

    def sample_prompt(self) -> tuple[list[int], str]:
        """Return ids and text of the prompt that samples answer: the stage's, or the first that
        leaves room.
        """
        own, tokens = self.stage.sample_prompt, self.stage.sample_tokens
        room = self.context - tokens
        choices = [(0.0, [{"role": "user", "content": own}], None)] if own else self.prompts
        for _, messages, tools in choices:
            variables = template_variables(tools)
            ids = self.tokenizer.encode_chat(messages, date=self.stage.date, **variables)
            if len(ids) <= room:
                return ids, messages[-1]["content"]
        if own and tokens:
            raise InputError(
                f"sample_prompt: expected at most {room} tokens, which leave room for sample_tokens"
                f" {tokens}, got more"
            )
        return [], ""

    def told(self) -> str:
        """Return how many rows were read, and what became of those that are not learnt from."""
        why = [f"{self.held_out:,} held out"] if self.held_out else []
        why += [reasons(self.rows.counts)] if self.rows.counts else []
        return f"{self.rows.read:,} rows ({', '.join(why)})" if why else f"{self.rows.read:,} rows"


def reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def rows_summary(result: Mapping[str, Any], learnt: str = "") -> str:
    """Return what a report says of the rows that were read; ``learnt``: what came of them."""
    used = f": {learnt} learnt from" if learnt else ""
    rows = f"{result['read']:,} rows{used}, {result['heldout']:,} held out"
    return f"{rows}; {reasons(result['counts'])}" if result["counts"] else rows
