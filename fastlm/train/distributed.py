"""The processes of a training that torchrun started: which one writes, what they tell each other.

Every process runs the same loop on its share of a step's micro-batches; an objective may divide
more (`fastlm.train.online`: the answers of a round). Rank 0 writes and reports.
What the loop decides (the loss, the end, Ctrl-C) is agreed on first, so all decide alike. Without
torchrun, `SingleProcess` exchanges nothing and imports no torch.distributed.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from secrets import token_hex
from socket import gethostname
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastlm.errors import InputError
from fastlm.torchrun import launched

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")
# The longest wait for another process. Rank 0 alone writes checkpoints and samples meanwhile
TIMEOUT = timedelta(minutes=10)
# How gloo reports a process that is gone: an error of its own has no class (torch 2.13)
LOST = re.compile(
    r"gloo/transport/.*(connection (closed|reset|refused)|broken pipe|timed? ?out)", re.IGNORECASE
)


class LostRankError(RuntimeError):
    """Another process of the training has ended, or does not answer."""


def check_replicas(what: str, parallel: str) -> None:
    """Raise InputError if torchrun started several processes that do not hold the model whole."""
    if parallel != "ddp" and launched()[1] > 1:
        raise InputError(f"parallel: wanted ddp with {what}, got {parallel}")


def says_first(text: str) -> bool:
    """Whether no other process of the job has asked this for the same text: what all of them would
    say is said once.
    """
    rank, size = launched()
    if size == 1:
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # the store of torchrun's agent
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        # not once per job: the same may be said again after a restart
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"fastlm/said/{_agreed or attempt}/{key}", 1) == 1
    except RuntimeError:
        return rank == 0


_agreed = ""  # the word of this process's last group


def agree(store: "Store", rank: int, size: int) -> str:
    """Return a new word that the processes of a group agree on. No group before had it.

    torchrun's store outlives the processes, and no variable of theirs numbers the groups:
    TORCHELASTIC_RESTART_COUNT is that of one agent, which may have joined later. So each process
    asks under a random name, and rank 0 answers whoever asks until all have heard the word. Names
    that dead processes left are answered too, which no one reads.
    """
    own = token_hex(8)
    if rank:
        store.set(f"fastlm/asks/{rank}", own)
        word = store.get(f"fastlm/answer/{own}").decode()
        store.set(f"fastlm/heard/{word}/{rank}", "")
        return word
    asks = [f"fastlm/asks/{other}" for other in range(1, size)]
    heard = [f"fastlm/heard/{own}/{other}" for other in range(1, size)]
    answered: set[bytes] = set()
    ends = time.monotonic() + TIMEOUT.total_seconds()
    while not store.check(heard):
        for name in set(store.multi_get(asks)) - answered:
            store.set(f"fastlm/answer/{name.decode()}", own)
            answered.add(name)
        if time.monotonic() > ends:
            raise LostRankError(f"rank 0 of {size}: not all processes have joined in {TIMEOUT}")
        time.sleep(0.02)
    return own


class SingleProcess:
    """The only process of a training."""

    rank, size = 0, 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def from_first(self, value: T) -> T:
        """Return rank 0's value."""
        return value

    def on_first(self, do: Callable[[], T]) -> T | None:
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


class ProcessGroup(SingleProcess):
    """One of several processes, joined by ``torch.distributed``. All make it together. What they
    tell each other goes over a gloo group of its own: that of a caller may be for GPUs alone.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def leave(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self.group)

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: T) -> T:
        import torch.distributed as dist

        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.group)
        return said[0]

    def on_first(self, do: Callable[[], T]) -> T | None:
        made, error = None, None
        if self.rank == 0:
            try:
                made = do()
            except InputError as caught:
                error = caught
        told = self.from_first(error)
        if told is not None:
            raise error or told
        return made

    def each(self, do: Callable[[], T]) -> list[T]:
        made, error = None, None
        try:
            made = do()
        except InputError as caught:
            error = caught
        found = self.gather((made, error))
        for rank, (_, told) in enumerate(found):
            if told is not None:
                raise error if error is not None and rank == self.rank else told
        return [cast(T, one) for one, _ in found]

    def any(self, flag: bool) -> bool:
        import torch
        import torch.distributed as dist

        told = torch.tensor([float(flag)])
        dist.all_reduce(told, group=self.group)
        return bool(told)

    def split_batches(self, batches: Sequence[T]) -> tuple[Sequence[T], T | None]:
        mine = batches[self.rank :: self.size]
        most = len(batches[:: self.size])
        return mine, batches[0] if len(mine) < most else None

    def seed(self, base: int, step: int) -> None:
        import torch

        text = f"{base} {step} {self.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))


def averaged(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean of each value over the processes, weighted by their items."""
    names = dict.fromkeys(name for _, values in parts for name in values)
    found = {}
    for name in names:
        known = [(items, values[name]) for items, values in parts if name in values]
        items = sum(items for items, _ in known)
        found[name] = sum(n * value for n, value in known) / items if items else known[0][1]
    return found


def is_lost(error: RuntimeError) -> bool:
    """Whether torch says so because another process is gone, or does not answer."""
    import torch.distributed as dist

    known = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, known) or LOST.search(_line(error)) is not None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def check_gpus(places: Sequence[tuple[str, str]]) -> None:
    """Raise InputError if two processes have their model on the same GPU. ``places``: host and GPU
    of each.
    """
    for rank, place in enumerate(places):
        if (other := places.index(place)) != rank:
            raise InputError(
                "device: wanted a GPU of its own for each process (that of LOCAL_RANK), got"
                f" processes {other} and {rank} on one GPU of {place[0]}"
            )


@contextmanager
def process_group(device: "torch.device") -> Iterator[SingleProcess]:
    """Context: this process among those that torchrun started. ``device``: of the model. A group
    that the caller made before is used and stays; it must serve the device.

    LostRankError: another process is gone. InputError: two models are on the same GPU.
    """
    global _agreed
    rank, size = launched()
    if size == 1:
        yield SingleProcess()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    made = not dist.is_initialized()
    cuda = device.type == "cuda"
    lost, world = False, None
    try:
        if cuda:
            torch.cuda.set_device(device)
        if made:
            store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            # torchrun keeps its store when it starts the processes again (torch 2.13): without a
            # prefix of their own, gloo may find the addresses of the processes that are gone
            _agreed = agree(store, rank, size)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, rank=rank,
                world_size=size, store=PrefixStore(f"fastlm/{_agreed}", store),
            )  # fmt: skip
        world = ProcessGroup()
        if cuda:
            gpu = torch.cuda.get_device_properties(device)
            check_gpus(world.gather((gethostname(), str(gpu.uuid))))
        yield world
    except RuntimeError as error:
        if is_lost(error):
            lost = True  # taking leave of it would wait
            text = _line(error)
            raise LostRankError(
                f"rank {rank} of {size}: another process has ended or does not answer"
                f" ({text:.300}); the same command resumes from the last checkpoint"
            ) from error
        raise
    finally:
        if not lost and dist.is_initialized():
            if made:
                dist.destroy_process_group()
            elif world is not None:
                world.leave()
