"""The interface between a training and the processes that torchrun started: collectives, and the
placement of the model. The classes here are for one process; they communicate nothing and import no
torch. `fastlm.train.parallel` has those for several processes.

Every process runs the same loop on its shard of a step's micro-batches. An objective may divide
more (`fastlm.train.online`: the answers of a round). Rank 0 writes and reports. Whatever the loop
decides on (the loss, the end, Ctrl-C) is exchanged first, so all processes decide alike.
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
    """Raised when another process of the training has ended or does not answer."""


def is_first_report(text: str) -> bool:
    """Return True in the first process of the job that calls this for ``text``, False in the
    others: a message that all processes would print is printed once.
    """
    rank, size = rank_and_world_size()
    if size == 1:
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # the store that torchrun's agent holds
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        # not once per job: a message may be repeated after a restart
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"fastlm/reported/{group_name or attempt}/{key}", 1) == 1
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

    def on_main_process(self, call: Callable[[], T]) -> T | None:
        """Return ``call()`` in rank 0, None in the others. Its InputError is raised in all."""
        return call()

    def gather_results(self, call: Callable[[], T]) -> list[T]:
        """Return ``call()`` of all processes, by rank. An InputError of one is raised in all; of
        several, that of the lowest rank.
        """
        return [call()]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process. This is a barrier."""
        return flag

    def shard(self, count: int) -> range:
        """Return this process's shard of ``count`` rows: consecutive ones, perhaps none."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def split_batches(self, batches: Sequence[T]) -> tuple[Sequence[T], T | None]:
        """Return this process's shard of a step's micro-batches. Where other processes have one
        more, the second value is a filler micro-batch, to run without effect; otherwise None.
        """
        return batches, None

    def seed(self, base: int, step: int) -> None:
        """Seed torch's generator (dropout) for this process in this step."""


class SingleDevice:
    """Holds the whole model in one process."""

    sharded = False

    def __init__(self, model: "nn.Module"):
        self.model = model

    def to(self, dtype: "torch.dtype") -> None:
        """Cast the model. Call it after the optimizer is constructed."""
        self.model.to(dtype)

    def run(self, call: Callable[[], T]) -> T:
        """Run a call that uses the model, without a backward pass."""
        return call()

    def backward(
        self, call: "Callable[[], Tensor]", *, last: bool, factor: float = 1.0
    ) -> "Tensor":
        """Accumulate the gradient of the loss ``call()`` and return the loss. ``last``: this is the
        last micro-batch of the step. ``factor`` scales the gradient.
        """
        loss = call()
        loss.backward()
        return loss.detach()

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Within this context all parameters are plain tensors, for anything but training."""
        yield

    def unshard(self) -> None:
        """Turn all parameters into plain tensors, at the end of the training."""

    def full_tensors(self, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Return the tensors unsharded."""
        return tensors

    def load(self, tensors: "dict[str, Tensor]") -> None:
        """Load unsharded tensors of the model's ``state_dict()``, perhaps not all, in place."""
        self.model.load_state_dict(tensors, strict=False)


def weighted_means(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean of each value over the processes, weighted by their items."""
    names = dict.fromkeys(name for _, values in parts for name in values)
    means = {}
    for name in names:
        pairs = [(items, values[name]) for items, values in parts if name in values]
        items = sum(items for items, _ in pairs)
        means[name] = sum(n * value for n, value in pairs) / items if items else pairs[0][1]
    return means
