"""The contract between the training loop and a stage, and what objectives on rows of data share:
examples, their packing into batches, and epochs.

An `Objective` defines the model and the data; `fastlm.train.pretrain.PretrainObjective`, for
example, predicts the next token. Nothing here imports numpy or torch before a model is trained.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastlm.train.distributed import SingleProcess

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.options import TrainOptions

    PackedBatch = tuple[Tensor, Tensor, Tensor]  # input_ids, shift_labels (1, total), cu_seqlens

IGNORE = -100


class DivergedError(ArithmeticError):
    """Raised when a training must not continue. The message names the step and the last good
    checkpoint in one line. ``steps``: the number of last steps that cannot be trusted.
    ``checkpoint``: the newest one from before them, if `train` raised this.
    """

    def __init__(self, message: str, *, steps: int = 0):
        super().__init__(message)
        self.steps = steps
        self.checkpoint: Path | None = None


class Objective(Protocol):
    """The model of a stage, its data and its loss. The loop owns the budget, the optimizer,
    clipping, checkpoints, resuming and logging.
    """

    trained: "nn.Module"
    """The module with all trained parameters. Several models (a policy and its value model) are an
    nn.ModuleDict. Frozen models (a reference) belong to the objective and are not checkpointed."""

    world: SingleProcess = SingleProcess()
    """The processes of the training, for an objective that divides more than micro-batches (such as
    rollouts). `train` sets it while it runs. All processes call the methods together, except
    `loss`, `state_dict` and `sample`.
    """

    steps_left: int | None = None
    """How many steps remain until `max_steps`, the next one included; None: there is no such limit.
    `train` sets it before each step."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups; a group's "lr" scales the scheduled rate (default 1)."""
        return decay_matrices(self.trained, weight_decay)

    def identity(self) -> dict[str, Any]:
        """Return what must match for a checkpoint to fit: data, sizes, frozen models."""
        raise NotImplementedError

    def next_batches(self, count: int) -> list[Any]:
        """Return the ``count`` micro-batches of the next step. They may come from data or be
        generated with the current models (rollouts).
        """
        raise NotImplementedError

    def num_items(self, batch: Any) -> int:
        """Return the number of items of the batch that the loss averages: tokens or pairs."""
        raise NotImplementedError

    def tokens(self, batch: Any) -> int:
        """Return the number of tokens of the batch that the loss counts, for budget and speed."""
        return self.num_items(batch)

    def loss(self, batch: Any, num_items: int) -> "Tensor":
        """Return the sum over the batch divided by ``num_items``, which counts all micro-batches of
        the step.
        """
        raise NotImplementedError

    def measurements(self) -> Any:
        """Return what `scalars` needs of the micro-batches that this process has run through `loss`
        since `next_batches` (perhaps none). The values can be pickled and are not on a GPU.
        """

    def scalars(self, measurements: Sequence[Any]) -> dict[str, float]:
        """Return further metrics of the last step, for its line in metrics.jsonl, from the
        `measurements` of all processes. All processes call this.
        """
        return {}

    def pending_steps(self) -> int:
        """Return how many of the last steps a later check may still reject (`DivergedError`). The
        loop keeps the newest checkpoint from before them.
        """
        return 0

    def check_pending(self) -> None:
        """Raise DivergedError if the last `pending_steps` steps of the training went too far."""

    def close(self) -> None:
        """Stop what the objective runs in the background. `train` calls this as it ends."""

    def position(self) -> str:
        """Describe where in the data the next batch begins, for an error message."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue to the same losses: JSON values, and at
        the top level also tensors (a buffer of rollouts).
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        raise NotImplementedError

    def sample(self) -> str | None:
        raise NotImplementedError


def decay_matrices(model: "nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices with weight decay, norms and biases without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens. ``ids`` is int32; ``loss_mask``, bool, is true for tokens with a
    loss. ``location``: its file and line.
    """

    ids: "np.ndarray"
    loss_mask: "np.ndarray"
    location: str = ""

    def __getitem__(self, tokens: slice) -> "Example":
        return Example(self.ids[tokens], self.loss_mask[tokens], self.location)

    @property
    def num_loss_tokens(self) -> int:
        """The number of tokens with a loss. The first token of an example is never predicted."""
        return int(self.loss_mask[1:].sum())

    def content(self) -> bytes:
        """Return the bytes that identify the example."""
        return len(self.ids).to_bytes(8, "little") + self.ids.tobytes() + self.loss_mask.tobytes()


def truncate(example: Example, max_length: int, truncation: str) -> list[Example]:
    """Cut the example to at most ``max_length`` tokens: keep its beginning ("truncate"),
    consecutive pieces ("split") or nothing ("skip"). Pieces without tokens to learn are left out.
    """
    length = len(example.ids)
    if truncation == "skip":
        pieces = [example] if length <= max_length else []
    else:
        starts = range(0, length if truncation == "split" else 1, max_length)
        pieces = [example[i : i + max_length] for i in starts] if length > max_length else [example]
    return [piece for piece in pieces if piece.num_loss_tokens]


def pack(examples: Sequence[Example], device: "torch.device | str" = "cpu") -> "PackedBatch":
    """Join examples without padding. Attention stays inside each (``cu_seqlens``), and only tokens
    with a loss have labels.
    """
    import numpy as np
    import torch

    ids = np.concatenate([e.ids[:-1] for e in examples]).astype(np.int64)
    labels = np.concatenate([np.where(e.loss_mask[1:], e.ids[1:], IGNORE) for e in examples])
    ends = np.cumsum([0, *(len(e.ids) - 1 for e in examples)], dtype=np.int32)
    packed = (ids[None], labels.astype(np.int64)[None], ends)
    input_ids, shift_labels, cu_seqlens = (torch.from_numpy(x).to(device) for x in packed)
    return input_ids, shift_labels, cu_seqlens


def pack_groups(
    groups: Sequence[Sequence[Example]], device: "torch.device | str" = "cpu"
) -> "tuple[PackedBatch, tuple[Tensor, Tensor]]":
    """Join groups of answers to one prompt like `pack`, and store the common prefix of a group
    once: the other answers of a group leave out what they share with its first, at most everything
    before the token that predicts their first token with a loss. Also return the keys of each
    answer, for `CausalLM.hidden`.
    """
    import numpy as np
    import torch

    pieces: list[Example] = []
    keys: list[np.ndarray] = []
    end = 0  # of the joined tokens
    for first, *others in groups:
        start, end = end, end + len(first.ids) - 1
        pieces.append(first)
        keys.append(np.arange(start, end))
        for other in others:
            n = min(len(first.ids) - 1, int(other.loss_mask[1:].argmax()))
            same = first.ids[:n] == other.ids[:n]
            shared = n if same.all() else int(same.argmin())
            pieces.append(other[shared:])
            begin, end = end, end + len(other.ids) - shared - 1
            keys.append(np.concatenate([np.arange(start, start + shared), np.arange(begin, end)]))
    ends = np.cumsum([0, *map(len, keys)], dtype=np.int32)
    rows, offsets = (torch.from_numpy(x).to(device) for x in (np.concatenate(keys), ends))
    return pack(pieces, device), (rows, offsets)


def examples_digest(examples: Sequence[Any]) -> str:
    """Return a hash of the examples, by their ``content()``, and their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.content())
    return digest.hexdigest()[:16]


def weights_digest(model: "nn.Module") -> str:
    """Return a hash of a model's weights and of how its adapters are applied."""
    import torch

    from fastlm.model.lora import lora_layers

    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for module in lora_layers(model).values():
        digest.update(module.extra_repr().encode())
    return digest.hexdigest()[:16]


def without_dropout(model: "nn.Module") -> None:
    """Switch attention dropout off, because the policy's log-probabilities must not be random."""
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]


@contextmanager
def in_dtype(model: "nn.Module", dtype: "torch.dtype") -> Iterator[None]:
    """Round the parameters to ``dtype`` within this context. The copy is freed before the optimizer
    needs the memory.
    """
    originals = [(p, p.data) for p in model.parameters()]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


@dataclass(frozen=True)
class Mixture:
    """A weighted mixture of data sources. ``counts`` are their numbers of examples, which stand one
    source after another. An epoch takes ``max(1, round(weight * count))`` examples of a source:
    with weight 2 each twice, with weight 0.5 a random half, a new one in each epoch.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    def epoch_counts(self) -> list[int]:
        """Return how many examples of each source an epoch takes."""
        pairs = zip(self.counts, self.weights, strict=True)
        return [max(1, round(weight * count)) if count else 0 for count, weight in pairs]

    def order(self, rng: "np.random.Generator") -> "np.ndarray":
        """Return the shuffled indices of an epoch's examples."""
        import numpy as np

        if set(self.weights) == {1.0}:
            return rng.permutation(sum(self.counts))
        indices, start = [], 0
        for count, epoch_count in zip(self.counts, self.epoch_counts()):
            source = np.arange(start, start + count)
            repeats, rest = divmod(epoch_count, count) if count else (0, 0)
            indices += [source] * repeats + [rng.choice(source, rest, replace=False)]
            start += count
        return rng.permutation(np.concatenate(indices))


class EpochObjective(Objective):
    """An objective on epochs of ``examples`` (`Example`, or objects with its ``location`` and
    ``content``).

    An epoch takes every example as often as ``mixture`` says, by default once, in an order that
    depends only on ``seed`` and the epoch. Its last step is smaller if the examples do not fill it.
    ``base`` identifies the initial weights; ``prompt``: the token ids that a sample answers.
    """

    def __init__(
        self,
        model: "nn.Module",
        examples: Sequence[Any],
        heldout: Sequence[Any],
        options: "TrainOptions",
        *,
        batch_size: int,
        seed: int,
        base: str,
        tokenizer: "Tokenizer | None" = None,
        prompt: Sequence[int] = (),
        mixture: Mixture | None = None,
    ):
        self.trained, self.device = model, next(model.parameters()).device
        self.examples, self.heldout, self.options = examples, heldout, options
        self.mixture = mixture or Mixture((len(examples),), (1.0,))
        self.batch_size, self.seed, self.base = batch_size, seed, base
        self.data, self.tokenizer, self.prompt = examples_digest(examples), tokenizer, prompt
        self.step_measurements: list[Any] = []  # of the step's micro-batches, by `loss`
        self._begin(0)

    def collate(self, examples: Sequence[Any]) -> Any:
        """Return the examples as a micro-batch."""
        raise NotImplementedError

    def _begin(self, epoch: int) -> None:
        import numpy as np

        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self.epoch, self.next_index = epoch, 0
        self.order = self.mixture.order(rng)

    def identity(self) -> dict[str, Any]:
        names = ("base", "data", "seed", "batch_size")
        identity = {name: getattr(self, name) for name in names}
        if set(self.mixture.weights) != {1.0}:
            identity["mixture"] = [list(self.mixture.counts), list(self.mixture.weights)]
        return identity

    def next_rows(self, count: int) -> list[list[int]]:
        """Return the indices of the examples of ``count`` micro-batches, or the rest of the
        epoch.
        """
        if self.next_index == len(self.order):
            self._begin(self.epoch + 1)
        self.step_measurements = []
        start, size = self.next_index, self.batch_size
        self.next_index = min(start + count * size, len(self.order))
        rows = self.order[start : self.next_index].tolist()
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def next_batches(self, count: int) -> list[Any]:
        """Return ``count`` micro-batches, or the rest of the epoch."""
        return [self.collate([self.examples[i] for i in rows]) for rows in self.next_rows(count)]

    def heldout_batches(self) -> Iterator[tuple[Sequence[Any], Any]]:
        """Yield the examples and micro-batches of a validation, of at most `val_tokens` tokens."""
        tokens = 0
        for start in range(0, len(self.heldout), self.batch_size):
            examples = self.heldout[start : start + self.batch_size]
            batch = self.collate(examples)
            yield examples, batch
            tokens += self.tokens(batch)
            if tokens >= self.options.val_tokens:
                return

    def scalars(self, measurements: Sequence[Any]) -> dict[str, float]:
        return {"epoch": self.epoch + self.next_index / len(self.order)}

    def position(self) -> str:
        if self.next_index == len(self.order):
            self._begin(self.epoch + 1)
        location = self.examples[self.order[self.next_index]].location
        return f"epoch {self.epoch}, from example {self.next_index}, {location}"

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "next_index": self.next_index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self.next_index = int(state["next_index"])

    def sample(self) -> str | None:
        import torch

        if self.tokenizer is None or not self.options.sample_tokens or not self.prompt:
            return None
        tokens = self.trained.generate(  # type: ignore[operator]
            torch.tensor([self.prompt], device=self.device),
            max_new_tokens=self.options.sample_tokens, temperature=0.0,
            stop_ids=tuple(self.tokenizer.stop_ids),
        )  # fmt: skip
        return self.tokenizer.decode(tokens[0, len(self.prompt) :].tolist())
