"""An objective's passes over examples: order, position, identity and samples. Nothing here imports
numpy or torch before a model is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlm.train.distributed import SingleProcess
from fastlm.train.objective import Objective

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.options import TrainOptions


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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records; nothing where no weight was given."""
        if set(self.weights) == {1.0}:
            return {}
        return {"mixture": [list(self.counts), list(self.weights)]}


class Epochs(Objective):
    """The part of an objective (`fastlm.train.objective`) that takes ``examples`` in epochs.

    An epoch takes every example as often as ``mixture`` says, by default once, in an order that
    depends only on ``seed`` and the epoch. Its last step is smaller where the examples do not fill
    it.

    ``places``: the file and line of each example. ``base`` identifies the weights that training
    began with, ``data`` the examples. ``prompt``: ids that a sample answers.
    """

    def __init__(
        self,
        model: "nn.Module",
        examples: Sequence[Any],
        heldout: Sequence[Any],
        options: "TrainOptions",
        *,
        places: Sequence[str],
        data: str,
        batch_size: int,
        seed: int,
        base: str,
        device: "torch.device",
        tokenizer: "Tokenizer | None" = None,
        prompt: Sequence[int] = (),
        mixture: Mixture | None = None,
    ):
        self.trained, self.world = model, SingleProcess()
        self.examples, self.heldout, self.options = examples, heldout, options
        self.places, self.mixture = places, mixture or Mixture((len(examples),), (1.0,))
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.base, self.data, self.tokenizer, self.prompt = base, data, tokenizer, prompt
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
        return {
            "base": self.base,
            "data": self.data,
            "seed": self.seed,
            "batch_size": self.batch_size,
            **self.mixture.identity(),
        }

    def take(self, count: int) -> list[list[int]]:
        """Return the examples of ``count`` micro-batches, or what the epoch has left."""
        if self.at == len(self.order):
            self._begin(self.epoch + 1)
        batches = []
        while len(batches) < count and self.at < len(self.order):
            batches.append(self.order[self.at : self.at + self.batch_size].tolist())
            self.at += self.batch_size
        self.at = min(self.at, len(self.order))
        return batches

    def next_batches(self, count: int) -> list[Any]:
        """Return ``count`` micro-batches, or what the epoch has left."""
        return [self.collate([self.examples[i] for i in rows]) for rows in self.take(count)]

    def scalars(self, measured: Sequence[Any]) -> dict[str, float]:
        return {"epoch": self.epoch + self.at / len(self.order)}

    def position(self) -> str:
        if self.at == len(self.order):
            self._begin(self.epoch + 1)
        return f"epoch {self.epoch}, from example {self.at}, {self.places[self.order[self.at]]}"

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
