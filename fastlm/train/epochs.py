"""An objective's passes over examples: order, position, identity and samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastlm.train.distributed import Alone

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.options import TrainOptions


class Epochs:
    """The part of an objective (`fastlm.train.objective`) that takes ``places`` (examples, by file
    and line) in epochs.

    An epoch takes every example once, in an order that depends only on ``seed`` and the epoch. Its
    last step is smaller where the examples do not fill it.

    ``base`` identifies the weights that training began with, ``data`` the examples. ``prompt``: ids
    that a sample answers.
    """

    def __init__(
        self,
        model: "nn.Module",
        places: Sequence[str],
        options: "TrainOptions",
        *,
        batch_size: int,
        seed: int,
        base: str,
        data: str,
        tokenizer: "Tokenizer | None",
        prompt: Sequence[int],
        device: "torch.device",
    ):
        self.trained, self.ranks = model, Alone()
        self.places, self.options = places, options
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.base, self.data, self.tokenizer, self.prompt = base, data, tokenizer, prompt
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        import numpy as np

        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self.epoch, self.at = epoch, 0
        self.order = self.order_of(rng)

    def order_of(self, rng: "np.random.Generator") -> "np.ndarray":
        """Return the places of an epoch's examples, in order."""
        return rng.permutation(len(self.places))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        from fastlm.train.objective import decay_matrices

        return decay_matrices(self.trained, weight_decay)

    def identity(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "data": self.data,
            "seed": self.seed,
            "batch_size": self.batch_size,
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

    def measurements(self) -> Any:
        return None

    def scalars(self, measured: Sequence[Any]) -> dict[str, float]:
        return {"epoch": self.epoch + self.at / len(self.order)}

    def unsettled(self) -> int:
        return 0

    def check_last(self) -> None:
        pass

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
