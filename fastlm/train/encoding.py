"""Conversations as tokens to learn from: what fine-tuning and preference training share."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastlm.errors import InputError
from fastlm.sources.rows import NAMED_LINES as NAMED

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from fastlm.data.conversations import Conversation
    from fastlm.pipeline.stage import Job
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.chat_stage import ChatStage

    Batch = tuple[Tensor, Tensor, Tensor]  # input_ids, shift_labels (1, total), cu_seqlens

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens: ``ids`` int32, ``mask`` bool, which of them are learnt. ``place``:
    its file and line.
    """

    ids: "np.ndarray"
    mask: "np.ndarray"
    place: str = ""

    @property
    def learnt(self) -> int:
        """Tokens with a loss: the first token of an example is never predicted."""
        return int(self.mask[1:].sum())


def fit(example: Example, seq_len: int, overlong: str) -> list[Example]:
    """The example in at most ``seq_len`` tokens: whole, its beginning ("truncate"), in consecutive
    pieces ("split") or not at all ("skip"). Pieces with nothing to learn are left out.
    """
    if len(example.ids) <= seq_len:
        pieces = [example]
    elif overlong == "skip":
        pieces = []
    else:
        starts = range(0, len(example.ids), seq_len) if overlong == "split" else (0,)
        pieces = [
            Example(example.ids[i : i + seq_len], example.mask[i : i + seq_len], example.place)
            for i in starts
        ]
    return [piece for piece in pieces if piece.learnt]


def pack(examples: Sequence[Example], device: "torch.device | str" = "cpu") -> "Batch":
    """Join examples without padding: attention stays inside each (``cu_seqlens``), and only learnt
    tokens have labels.
    """
    import numpy as np
    import torch

    ids = np.concatenate([e.ids[:-1] for e in examples]).astype(np.int64)
    labels = np.concatenate([np.where(e.mask[1:], e.ids[1:], IGNORE) for e in examples])
    ends = np.cumsum([0, *(len(e.ids) - 1 for e in examples)], dtype=np.int32)
    packed = (ids[None], labels.astype(np.int64)[None], ends)
    input_ids, shift_labels, cu_seqlens = (torch.from_numpy(x).to(device) for x in packed)
    return input_ids, shift_labels, cu_seqlens


def pack_pairs(
    pairs: Sequence[tuple[Example, ...]], device: "torch.device | str" = "cpu"
) -> "tuple[Batch, tuple[Tensor, Tensor]]":
    """Join pairs of answers to one prompt as `pack` does, in turns, but the second without what it
    shares with the first: at most all before the token that predicts its first learnt one. Also
    return the keys of each, for `CausalLM.hidden`.
    """
    import numpy as np
    import torch

    own: list[Example] = []
    keys: list[np.ndarray] = []
    start = 0  # of a pair's first answer
    for first, second in pairs:
        n = min(len(first.ids) - 1, int(second.mask[1:].argmax()))
        same = first.ids[:n] == second.ids[:n]
        shared = n if same.all() else int(same.argmin())
        rest = Example(second.ids[shared:], second.mask[shared:], second.place)
        own += [first, rest]
        middle = start + len(first.ids) - 1
        end = middle + len(rest.ids) - 1
        keys.append(np.arange(start, middle))
        keys.append(np.concatenate([np.arange(start, start + shared), np.arange(middle, end)]))
        start = end
    ends = np.cumsum([0, *map(len, keys)], dtype=np.int32)
    rows, offsets = (torch.from_numpy(x).to(device) for x in (np.concatenate(keys), ends))
    return pack(own, device), (rows, offsets)


def digest(examples: Sequence[Example]) -> str:
    """Identify examples and their order."""
    import numpy as np

    found = hashlib.sha256()
    for example in examples:
        found.update(np.int64(len(example.ids)).tobytes())
        found.update(example.ids.tobytes())
        found.update(example.mask.tobytes())
    return found.hexdigest()[:16]


def weights_digest(model: "nn.Module") -> str:
    """Identify a model's weights, and how its adapters are applied."""
    import torch

    from fastlm.model.lora import lora_of

    found = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for module in lora_of(model).values():
        found.update(module.extra_repr().encode())
    return found.hexdigest()[:16]


class Keyed(Protocol):
    """A row of data that knows its prompt."""

    def key(self) -> str: ...


def place_in_order(row: Keyed) -> float:
    """A number in [0, 1) from a hash of the prompt. Those below `heldout` are held out: the part
    of a row does not depend on other rows, and rows with one prompt are on one side.
    """
    found = hashlib.sha256(row.key().encode()).digest()
    return int.from_bytes(found[:8], "big") / 2**64


def without_dropout(model: "nn.Module") -> None:
    """Switch attention dropout off: the policy's log-probabilities must not be random."""
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]


@contextmanager
def in_dtype(model: "nn.Module", dtype: "torch.dtype") -> Iterator[None]:
    """Round the parameters to ``dtype`` for a while. The copy is gone before the optimizer needs
    the memory.
    """
    kept = [(p, p.data) for p in model.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


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
                "chat_template: wanted one, since the model has neither a template nor"
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
                f"{name}: wanted the vocabulary of the model that is trained, in which token {i} is"
                f" {theirs!r}, got one in which it is {ours!r}"
            )


class TrainingData:
    """The rows of a stage's data as tokens: ``training`` examples, and ``heldout`` ones, of
    ``held_out`` rows, in the order of `place_in_order`.

    A subclass defines `read`, `prompt_of` and `encode`. A row that the chat template refuses is an
    error, or with `skip_bad` counted. ``context``: the most tokens of a prompt and its sample.
    """

    def __init__(
        self, stage: "ChatStage", tokenizer: "Tokenizer", seq_len: int, context: int, job: "Job"
    ):
        from fastlm.data.conversations import Rows

        self.stage, self.tokenizer, self.job = stage, tokenizer, job
        self.seq_len, self.context = seq_len, context
        self.rows, self.prompts = Rows(), SamplePrompts()
        self.refused = self.held_out = 0
        self.training: list[Any] = []
        heldout: list[tuple[float, Any]] = []
        for row in job.track(self.read(), f"reading {stage.rows}", unit=stage.rows):
            examples = self.encode(row)
            if not examples:
                continue
            keyed, messages, tools = self.prompt_of(row)
            place = place_in_order(keyed)
            self.prompts.add(place, messages, tools)
            if place < stage.heldout:
                self.held_out += 1
                heldout += [(place, example) for example in examples]
            else:
                self.learn(examples)
        if self.refused > NAMED:
            job.skipped(f"{self.refused - NAMED:,} more that the chat template refuses")
        self.heldout = [example for _, example in sorted(heldout, key=lambda pair: pair[0])]

    def read(self) -> Iterator[Any]:
        """Yield the rows."""
        raise NotImplementedError

    def reading(self) -> dict[str, Any]:
        """Return the options of the functions that read rows."""
        return {
            "cache": self.job.cache, "skip_bad": self.stage.skip_bad, "rows": self.rows,
            "tell": self.job.skipped,
        }  # fmt: skip

    def prompt_of(self, row: Any) -> "tuple[Keyed, list[dict[str, Any]], list[Any] | None]":
        """Return what identifies the row's prompt, its messages and its tools."""
        raise NotImplementedError

    def encode(self, row: Any) -> Sequence[Any]:
        """Return the examples of a row, none if it is left out."""
        raise NotImplementedError

    def learn(self, examples: Sequence[Any]) -> None:
        """Take the examples of a row that is not held out."""
        self.training += examples

    def encode_messages(self, conversation: "Conversation") -> list[Example]:
        """See `Tokenizer.encode_conversation`; [] if the template refuses."""
        import numpy as np

        tools, place = conversation.tools, conversation.place
        variables: dict[str, Any] = {} if tools is None else {"tools": tools}
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
            self.job.skipped(str(refusal))

    def told(self) -> str:
        """Return how many rows were read, and what became of those that are not learnt from."""
        why = [f"{self.held_out:,} held out"] if self.held_out else []
        why += [reasons(self.rows.counts)] if self.rows.counts else []
        return f"{self.rows.read:,} rows ({', '.join(why)})" if why else f"{self.rows.read:,} rows"


class SamplePrompts:
    """The prompts that samples answer: the first ones in the order of `place_in_order`, so that
    held-out ones come before others.
    """

    def __init__(self) -> None:
        self.first: list[tuple[float, list[dict[str, Any]], list[Any] | None]] = []

    def add(self, place: float, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        self.first.append((place, messages, tools))
        self.first = sorted(self.first, key=lambda prompt: prompt[0])[:8]

    def choose(
        self, stage: "ChatStage", tokenizer: "Tokenizer", context: int
    ) -> tuple[list[int], str]:
        """Return ids and text of the stage's prompt, or of the first one that leaves room."""
        room = context - stage.sample_tokens
        given = stage.sample_prompt
        choices = [(0.0, [{"role": "user", "content": given}], None)] if given else self.first
        for _, messages, tools in choices:
            variables: dict[str, Any] = {} if tools is None else {"tools": tools}
            ids = tokenizer.encode_chat(messages, date=stage.date, **variables)
            if len(ids) <= room:
                return ids, messages[-1]["content"]
        if given and stage.sample_tokens:
            raise InputError(
                f"sample_prompt: wanted at most {room} tokens, which leave room for sample_tokens"
                f" {stage.sample_tokens}, got more"
            )
        return [], ""


def reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def rows_text(result: Mapping[str, Any], learnt: str = "") -> str:
    """Return what a report says of the rows that were read; ``learnt``: what came of them."""
    used = f": {learnt} learnt from" if learnt else ""
    rows = f"{result['read']:,} rows{used}, {result['heldout']:,} held out"
    return f"{rows}; {reasons(result['counts'])}" if result["counts"] else rows
