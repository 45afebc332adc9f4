"""What the training loop asks of a stage, and what objectives on rows of data share: examples, how
they are joined into a batch, and passes over them.

An `Objective` says what is trained, and on what; `fastlm.train.pretrain.PretrainObjective` predicts
the next token. Nothing here imports numpy or torch before a model is trained.
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
    """A training that must not go on. The message names the step and the last good checkpoint in
    one line. ``steps``: how many steps ago all was well; raised by `train`, ``good`` is the newest
    checkpoint that old.
    """

    def __init__(self, message: str, *, steps: int = 0):
        super().__init__(message)
        self.steps = steps
        self.good: Path | None = None


class Objective(Protocol):
    """What a stage trains, and on what. The loop owns the budget, the optimizer, clipping,
    checkpoints, resuming and logging.
    """

    trained: "nn.Module"
    """The module with all trained parameters. Several models (a policy and its value model) are an
    nn.ModuleDict. Frozen models (a reference) belong to the objective and are not checkpointed."""

    world: SingleProcess = SingleProcess()
    """The processes of the training, for an objective that divides more than micro-batches among
    them (rollouts). `train` sets it while it runs. All processes call the methods together, but for
    `loss`, `state_dict` and `sample`.
    """

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups; a group's "lr" scales the scheduled rate (default 1)."""
        return decay_matrices(self.trained, weight_decay)

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to fit: data, sizes, frozen models."""
        raise NotImplementedError

    def next_batches(self, count: int) -> list[Any]:
        """Return the ``count`` micro-batches of the next step. They may come from data or be
        generated with the current models (rollouts).
        """
        raise NotImplementedError

    def num_items(self, batch: Any) -> int:
        """Return how many items of the batch the loss is a mean of: tokens, pairs."""
        raise NotImplementedError

    def tokens(self, batch: Any) -> int:
        """Return the number of tokens of the batch that the loss counts, for budget and speed."""
        return self.num_items(batch)

    def loss(self, batch: Any, num_items: int) -> "Tensor":
        """Return the sum over the batch / ``num_items`` (of all micro-batches of the step)."""
        raise NotImplementedError

    def measurements(self) -> Any:
        """Return what `scalars` needs of the micro-batches that had their `loss` in this process
        since `next_batches`, perhaps none: what pickle can carry, no tensors of a GPU.
        """

    def scalars(self, measured: Sequence[Any]) -> dict[str, float]:
        """Return what else the last step measured, for its line in metrics.jsonl, from the
        `measurements` of all processes. All call it.
        """
        return {}

    def pending_steps(self) -> int:
        """Return how many of the last steps a later check may condemn (`DivergedError`): the newest
        checkpoint from before them is kept.
        """
        return 0

    def check_pending(self) -> None:
        """Raise DivergedError where the `pending_steps` steps before the end went too far."""

    def position(self) -> str:
        """Return where in the data the next batch begins, for an error message."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue to the same losses: JSON values, and
        tensors (a buffer of rollouts) as values of the outermost level.
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        raise NotImplementedError

    def sample(self) -> str | None:
        raise NotImplementedError


def decay_matrices(model: "nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens: ``ids`` int32, ``mask`` bool, which of them are learnt. ``place``:
    its file and line.
    """

    ids: "np.ndarray"
    mask: "np.ndarray"
    place: str = ""

    def __getitem__(self, tokens: slice) -> "Example":
        return Example(self.ids[tokens], self.mask[tokens], self.place)

    @property
    def learnt(self) -> int:
        """Tokens with a loss: the first token of an example is never predicted."""
        return int(self.mask[1:].sum())

    def content(self) -> bytes:
        return len(self.ids).to_bytes(8, "little") + self.ids.tobytes() + self.mask.tobytes()


def fit(example: Example, max_length: int, truncation: str) -> list[Example]:
    """The example in at most ``max_length`` tokens: whole, its beginning ("truncate"), in
    consecutive pieces ("split") or not at all ("skip"). Pieces with nothing to learn are left out.
    """
    length = len(example.ids)
    if truncation == "skip":
        pieces = [example] if length <= max_length else []
    else:
        starts = range(0, length if truncation == "split" else 1, max_length)
        pieces = [example[i : i + max_length] for i in starts] if length > max_length else [example]
    return [piece for piece in pieces if piece.learnt]


def pack(examples: Sequence[Example], device: "torch.device | str" = "cpu") -> "PackedBatch":
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


def pack_groups(
    groups: Sequence[Sequence[Example]], device: "torch.device | str" = "cpu"
) -> "tuple[PackedBatch, tuple[Tensor, Tensor]]":
    """Join groups of answers to one prompt as `pack` does, but the others of a group without what
    they share with its first: at most all before the token that predicts their first learnt one.
    Also return the keys of each, for `CausalLM.hidden`.
    """
    import numpy as np
    import torch

    own: list[Example] = []
    keys: list[np.ndarray] = []
    end = 0  # of what is joined so far
    for first, *others in groups:
        start, end = end, end + len(first.ids) - 1
        own.append(first)
        keys.append(np.arange(start, end))
        for other in others:
            n = min(len(first.ids) - 1, int(other.mask[1:].argmax()))
            same = first.ids[:n] == other.ids[:n]
            shared = n if same.all() else int(same.argmin())
            own.append(other[shared:])
            begin, end = end, end + len(other.ids) - shared - 1
            keys.append(np.concatenate([np.arange(start, start + shared), np.arange(begin, end)]))
    ends = np.cumsum([0, *map(len, keys)], dtype=np.int32)
    rows, offsets = (torch.from_numpy(x).to(device) for x in (np.concatenate(keys), ends))
    return pack(own, device), (rows, offsets)


def digest(examples: Sequence[Any]) -> str:
    """Identify examples, by their ``content()``, and their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(example.content())
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


@dataclass(frozen=True)
class Mixture:
    """Sources of ``counts`` examples, one after another, each with a weight. An epoch takes
    ``max(1, round(weight * count))`` examples of a source: with weight 2 each twice, with weight
    0.5 a random half, another one in each epoch.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    def taken(self) -> list[int]:
        """How many examples of each source an epoch takes."""
        pairs = zip(self.counts, self.weights, strict=True)
        return [max(1, round(weight * count)) if count else 0 for count, weight in pairs]

    def order(self, rng: "np.random.Generator") -> "np.ndarray":
        """The indices of an epoch's examples, shuffled."""
        import numpy as np

        if set(self.weights) == {1.0}:
            return rng.permutation(sum(self.counts))
        chosen, start = [], 0
        for count, taken in zip(self.counts, self.taken()):
            every = np.arange(start, start + count)
            whole, rest = divmod(taken, count) if count else (0, 0)
            chosen += [every] * whole + [rng.choice(every, rest, replace=False)]
            start += count
        return rng.permutation(np.concatenate(chosen))


class EpochObjective(Objective):
    """An objective on ``examples`` (`Example` or what has its ``place`` and ``content``).

    An epoch takes every example as often as ``mixture`` says, by default once, in an order that
    depends only on ``seed`` and the epoch. Its last step is smaller where the examples do not fill
    it. ``base`` identifies the weights that training began with; ``prompt``: ids that a sample
    answers.
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
        self.data, self.tokenizer, self.prompt = digest(examples), tokenizer, prompt
        self.measured: list[Any] = []  # of the step's micro-batches, by `loss`
        self._begin(0)

    def collate(self, examples: Sequence[Any]) -> Any:
        """Return a micro-batch."""
        raise NotImplementedError

    def _begin(self, epoch: int) -> None:
        import numpy as np

        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self.epoch, self.at = epoch, 0
        self.order = self.mixture.order(rng)

    def identity(self) -> dict[str, Any]:
        names = ("base", "data", "seed", "batch_size")
        identity = {name: getattr(self, name) for name in names}
        if set(self.mixture.weights) != {1.0}:
            identity["mixture"] = [list(self.mixture.counts), list(self.mixture.weights)]
        return identity

    def take(self, count: int) -> list[list[int]]:
        """Return the examples of ``count`` micro-batches, or what the epoch has left."""
        if self.at == len(self.order):
            self._begin(self.epoch + 1)
        self.measured = []
        start, size = self.at, self.batch_size
        self.at = min(start + count * size, len(self.order))
        rows = self.order[start : self.at].tolist()
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def next_batches(self, count: int) -> list[Any]:
        """Return ``count`` micro-batches, or what the epoch has left."""
        return [self.collate([self.examples[i] for i in rows]) for rows in self.take(count)]

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

    def scalars(self, measured: Sequence[Any]) -> dict[str, float]:
        return {"epoch": self.epoch + self.at / len(self.order)}

    def position(self) -> str:
        if self.at == len(self.order):
            self._begin(self.epoch + 1)
        place = self.examples[self.order[self.at]].place
        return f"epoch {self.epoch}, from example {self.at}, {place}"

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self.at = int(state["at"])

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
