"""The processes of a training that torchrun started: what they tell each other, and how they hold
its model: whole in each (DDP), or each a shard (FSDP2).

Gradients are summed over the processes, because a loss is already divided by the items of the whole
step. They are summed in float32, whatever their dtype: a sum of 1,024 in bfloat16 would lose bits.

Both wrap `CallWrapper`, a module whose forward is a call of the objective. Their hooks thus fire
once per micro-batch, whichever methods of the model an objective uses. Rejected: wrapping the model
and registering the methods (``hidden``, ``logprobs``, ...) one by one.
"""

import hashlib
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from secrets import token_hex
from socket import gethostname
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.torchrun import node_size, rank_and_world_size
from fastlm.train import distributed
from fastlm.train.distributed import LostRankError, SingleDevice, SingleProcess
from fastlm.train.options import TrainOptions

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")
# The longest wait for another process. Rank 0 alone writes checkpoints and samples meanwhile
TIMEOUT = timedelta(minutes=10)
# How gloo reports a process that is gone: an error of its own has no class (torch 2.13)
LOST = re.compile(
    r"gloo/transport/.*(connection (closed|reset|refused)|broken pipe|timed? ?out)", re.IGNORECASE
)
# Where nn.Module keeps the hooks of `fully_shard`
HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"
)  # fmt: skip


def _attempt(do: Callable[[], T]) -> tuple[T | None, InputError | None]:
    """Return ``do()``, and its InputError."""
    try:
        return do(), None
    except InputError as error:
        return None, error


class ProcessGroup(SingleProcess):
    """One of several processes, joined by ``torch.distributed``. All make it together. What they
    tell each other goes over a gloo group of its own: that of a caller may be for GPUs alone.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def broadcast(self, value: T) -> T:
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.group)
        return said[0]

    def on_main_process(self, do: Callable[[], T]) -> T | None:
        made, error = _attempt(do) if self.rank == 0 else (None, None)
        if (first := self.broadcast(error)) is not None:
            raise error or first
        return made

    def each(self, do: Callable[[], T]) -> list[T]:
        made, error = _attempt(do)
        found = self.gather((made, error))
        for rank, (_, other) in enumerate(found):
            if other is not None:
                raise error if error is not None and rank == self.rank else other
        return [cast(T, one) for one, _ in found]

    def any(self, flag: bool) -> bool:
        told = torch.tensor([float(flag)])
        dist.all_reduce(told, group=self.group)
        return bool(told)

    def split_batches(self, batches: Sequence[T]) -> tuple[Sequence[T], T | None]:
        mine = batches[self.rank :: self.size]
        most = len(batches[:: self.size])
        return mine, batches[0] if len(mine) < most else None

    def seed(self, base: int, step: int) -> None:
        text = f"{base} {step} {self.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))


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


def is_lost(error: RuntimeError) -> bool:
    """Whether torch says so because another process is gone, or does not answer."""
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
                "device: expected a GPU of its own for each process (that of LOCAL_RANK), got"
                f" processes {other} and {rank} on one GPU of {place[0]}"
            )


@contextmanager
def process_group(device: torch.device) -> Iterator[SingleProcess]:
    """Context: this process among those that torchrun started. ``device``: of the model. A group
    that the caller made before is used and stays; it must serve the device.

    LostRankError: another process is gone. InputError: two models are on the same GPU.
    """
    rank, size = rank_and_world_size()
    if size == 1:
        yield SingleProcess()
        return
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    made = not dist.is_initialized()
    cuda = device.type == "cuda"
    lost = False
    world: ProcessGroup | None = None
    try:
        if cuda:
            torch.cuda.set_device(device)
        if made:
            store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            # torchrun keeps its store when it starts the processes again (torch 2.13): without a
            # prefix of their own, gloo may find the addresses of the processes that are gone
            distributed.group_name = agree(store, rank, size)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, rank=rank,
                world_size=size, store=PrefixStore(f"fastlm/{distributed.group_name}", store),
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
                dist.destroy_process_group(world.group)


class CallWrapper(nn.Module):
    """Runs a call that uses ``model``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class DataParallel(SingleDevice):
    """A model that each process holds whole, in ``DistributedDataParallel``. Gradients are summed
    in buckets while the backward of the last micro-batch runs.
    """

    def to(self, dtype: torch.dtype) -> None:
        from torch.nn.parallel import DistributedDataParallel

        super().to(dtype)
        with warnings.catch_warnings():
            # torch 2.13 has another name for broadcast_buffers, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            self.ddp = DistributedDataParallel(
                CallWrapper(self.model), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.ddp.register_comm_hook(None, _summed)

    def backward(self, call: Callable[[], Tensor], *, last: bool, factor: float = 1.0) -> Tensor:
        with nullcontext() if last else self.ddp.no_sync():
            loss = self.ddp(call)
            (loss if factor == 1 else loss * factor).backward()
        return loss.detach()


def _summed(state: None, bucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for a bucket: a sum, where its own default is a mean."""
    del state
    own = bucket.buffer()
    wide = own.float()
    work = dist.all_reduce(wide, async_op=True)
    assert work is not None  # async
    return work.get_future().then(lambda done: own.copy_(done.value()[0]))


class FullySharded(SingleDevice):
    """A model of whose parameters, gradients and optimizer state each process holds a part
    (``fully_shard``): the layers one by one, and the rest together. ``within``: the number of
    processes that hold a whole model together; the gradients of such groups are then summed.
    """

    sharded = True

    def __init__(self, model: nn.Module, size: int, within: int):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        super().__init__(model)
        self.root = CallWrapper(model)
        shape = (size,) if within == size else (size // within, within)
        names = ("replicate", "shard")[-len(shape) :]
        device = next(model.parameters()).device.type
        how: dict[str, Any] = {
            "mesh": init_device_mesh(device, shape, mesh_dim_names=names),
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        }
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in [layer for layers in lists for layer in layers]:
            fully_shard(layer, **how)
        # the head is used after the layers, by objectives outside of the model's forward too
        fully_shard(self.root, reshard_after_forward=False, **how)
        self.parts = [m for m in self.root.modules() if isinstance(m, FSDPModule)]
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

    def to(self, dtype: torch.dtype) -> None:
        self.root.to(dtype)

    def run(self, call: Callable[[], T]) -> T:
        try:
            return self.root(call)
        finally:
            self._reshard()

    def backward(self, call: Callable[[], Tensor], *, last: bool, factor: float = 1.0) -> Tensor:
        loss = self.root(call)
        (loss if factor == 1 else loss * factor).backward()
        return loss.detach()

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        hooks = self._gather()
        yield
        for part, kept in zip(self.parts, hooks, strict=True):
            for name, own in kept.items():
                setattr(part, name, own)
        self._reshard()

    def unshard(self) -> None:
        self._gather()

    def _gather(self) -> list[dict[str, Any]]:
        """Gather all parameters. Return the hooks that would shard them again, taken off. With the
        hooks, FSDP2 would also learn an order of layers from calls that one process makes alone,
        and gather in that order in the next backward: the others would wait for ever.
        """
        hooks = []
        for part in self.parts:
            part.unshard()
            hooks.append({name: getattr(part, name) for name in HOOKS})
            for name in HOOKS:
                setattr(part, name, OrderedDict())
        return hooks

    def _reshard(self) -> None:
        for part in self.parts:
            part.reshard()

    def full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        return {
            name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        parts = {}
        for name, own in self.model.state_dict().items():
            if name in tensors:
                parts[name] = tensors[name]
                if isinstance(own, DTensor):
                    parts[name] = distribute_tensor(tensors[name], own.device_mesh, own.placements)
        super().load(parts)


def parallel(model: nn.Module, options: TrainOptions, world: SingleProcess) -> SingleDevice:
    """Return how this process holds ``model``. Call it before the optimizer is made.

    InputError: fsdp, and weights that are not trained; a model that fsdp or hsdp trained before.
    """
    if world.size == 1:
        return SingleDevice(model)
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise InputError(
            "parallel: expected a model that fsdp or hsdp did not train before in this program, got"
            " one; save it, and load it again"
        )
    if options.parallel == "ddp":
        return DataParallel(model)
    if not all(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"parallel: expected ddp where a part of the weights is frozen, got {options.parallel}"
        )
    return FullySharded(
        model, world.size, node_size() if options.parallel == "hsdp" else world.size
    )
