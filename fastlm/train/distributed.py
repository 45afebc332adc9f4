"""How a training stands among the processes that torchrun started: which one writes, what
they tell each other, and how they hold the model. This is the training of one process; it exchanges
nothing and imports no torch. `fastlm.train.parallel` is that of several.

Every process runs the same loop on its share of a step's micro-batches; an objective may divide
more (`fastlm.train.online`: the answers of a round). Rank 0 writes and reports. What the loop
decides (the loss, the end, Ctrl-C) is agreed on first, so all decide alike.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from fastlm.torchrun import rank_and_world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
group_name = ""  # of this process's last group, set by `fastlm.train.parallel.process_group`


class LostRankError(RuntimeError):
    """Another process of the training has ended, or does not answer."""


def is_first_report(text: str) -> bool:
    """Whether no other process of the job has asked this for the same text: what all of them would
    say is said once.
    """
    rank, size = rank_and_world_size()
    if size == 1:
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # the store of torchrun's agent
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        # not once per job: the same may be said again after a restart
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"fastlm/said/{group_name or attempt}/{key}", 1) == 1
    except RuntimeError:
        return rank == 0


class SingleProcess:
    """The only process of a training."""

    rank, size = 0, 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value."""
        return value

    def on_main_process(self, do: Callable[[], T]) -> T | None:
        """Return ``do()`` in rank 0, None in the others. Its InputError is raised in all."""
        return do()

    def each(self, do: Callable[[], T]) -> list[T]:
        """Return ``do()`` of all processes, by rank. An InputError of one is raised in all: of
        several, that of the lowest rank.
        """
        return [do()]

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes. All have arrived here when it returns."""
        return flag

    def share(self, count: int) -> range:
        """Return this process's share of ``count`` rows: consecutive ones, which may be none."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def split_batches(self, batches: Sequence[T]) -> tuple[Sequence[T], T | None]:
        """Return this process's share of a step's micro-batches. The second value is not None where
        others have one more: a micro-batch to run beside them, without effect.
        """
        return batches, None

    def seed(self, base: int, step: int) -> None:
        """Seed torch's generator (dropout) for this process in this step."""


class SingleDevice:
    """A model in one process."""

    sharded = False

    def __init__(self, model: "nn.Module"):
        self.model = model

    def to(self, dtype: "torch.dtype") -> None:
        """Cast the model. Call it after the optimizer was made."""
        self.model.to(dtype)

    def run(self, call: Callable[[], T]) -> T:
        """Run a call that uses the model without a backward."""
        return call()

    def backward(
        self, call: "Callable[[], Tensor]", *, last: bool, factor: float = 1.0
    ) -> "Tensor":
        """Add the gradient of a loss. Return the loss. ``last``: of the step."""
        loss = call()
        loss.backward()
        return loss.detach()

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Context: all parameters are plain tensors, for anything but training."""
        yield

    def unshard(self) -> None:
        """Leave a model of plain parameters, at the end of the training."""

    def full(self, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Return the tensors as plain ones."""
        return tensors

    def load(self, tensors: "dict[str, Tensor]") -> None:
        """Undo `full` of some of the model's ``state_dict()``, in place."""
        self.model.load_state_dict(tensors, strict=False)


def weighted_means(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean of each value over the processes, weighted by their items."""
    names = dict.fromkeys(name for _, values in parts for name in values)
    found = {}
    for name in names:
        known = [(items, values[name]) for items, values in parts if name in values]
        items = sum(items for items, _ in known)
        found[name] = sum(n * value for n, value in known) / items if items else known[0][1]
    return found
