"""The processes of a training that torchrun started: collectives, and the placement of the model.
Each process holds a replica (DDP) or a shard (FSDP2).

Gradients are summed over the processes, because a loss is already divided by the items of the whole
step. The sum is in float32, whatever the dtype of the gradients: a sum of 1,024 values in bfloat16
would lose bits.

Both wrap a `CallWrapper`, a module whose forward is a call of the objective. Their hooks thus fire
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
# How gloo reports a lost process: the error has no class of its own (torch 2.13)
LOST = re.compile(
    r"gloo/transport/.*(connection (closed|reset|refused)|broken pipe|timed? ?out)", re.IGNORECASE
)
# The attributes of nn.Module that hold the hooks of `fully_shard`
HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"
)  # fmt: skip


def _attempt(call: Callable[[], T]) -> tuple[T | None, InputError | None]:
    """Return the result of ``call()`` and None, or None and its InputError."""
    try:
        return call(), None
    except InputError as error:
        return None, error


class ProcessGroup(SingleProcess):
    """One of several processes that ``torch.distributed`` joins. All construct it together. They
    communicate over a separate gloo group, because a caller's group may serve only GPUs.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def on_main_process(self, call: Callable[[], T]) -> T | None:
        result, error = _attempt(call) if self.rank == 0 else (None, None)
        if (first := self.broadcast(error)) is not None:
            raise error or first
        return result

    def gather_results(self, call: Callable[[], T]) -> list[T]:
        result, error = _attempt(call)
        pairs = self.gather((result, error))
        for rank, (_, other) in enumerate(pairs):
            if other is not None:
                raise error if error is not None and rank == self.rank else other
        return [cast(T, result) for result, _ in pairs]

    def any(self, flag: bool) -> bool:
        total = torch.tensor([float(flag)])
        dist.all_reduce(total, group=self.group)
        return bool(total)

    def split_batches(self, batches: Sequence[T]) -> tuple[Sequence[T], T | None]:
        shard = batches[self.rank :: self.size]
        max_count = len(batches[:: self.size])
        return shard, batches[0] if len(shard) < max_count else None

    def seed(self, base: int, step: int) -> None:
        text = f"{base} {step} {self.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))


def agree_on_group_name(store: "Store", rank: int, size: int) -> str:
    """Return a new name that all processes of the group share and no earlier group had.

    torchrun's store outlives the processes, and none of its variables numbers the groups:
    TORCHELASTIC_RESTART_COUNT counts the restarts of one agent, which may have joined later. So
    each process sends a request under a random token, and rank 0 replies to every request until all
    processes have acknowledged the name. It also replies to requests of dead processes; nothing
    reads those replies.
    """
    token = token_hex(8)
    if rank:
        store.set(f"fastlm/request/{rank}", token)
        name = store.get(f"fastlm/reply/{token}").decode()
        store.set(f"fastlm/acknowledged/{name}/{rank}", "")
        return name
    requests = [f"fastlm/request/{other}" for other in range(1, size)]
    acknowledged = [f"fastlm/acknowledged/{token}/{other}" for other in range(1, size)]
    answered: set[bytes] = set()
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not store.check(acknowledged):
        for request in set(store.multi_get(requests)) - answered:
            store.set(f"fastlm/reply/{request.decode()}", token)
            answered.add(request)
        if time.monotonic() > deadline:
            raise LostRankError(f"rank 0 of {size}: not all processes have joined in {TIMEOUT}")
        time.sleep(0.02)
    return token


def is_lost(error: RuntimeError) -> bool:
    """Return whether torch raised this because another process is gone or does not answer."""
    classes = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, classes) or LOST.search(_line(error)) is not None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def check_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Raise InputError if two processes have their model on the same GPU. ``gpus``: host and GPU
    of each process.
    """
    for rank, gpu in enumerate(gpus):
        if (other := gpus.index(gpu)) != rank:
            raise InputError(
                "device: expected a GPU of its own for each process (that of LOCAL_RANK), got"
                f" processes {other} and {rank} on one GPU of {gpu[0]}"
            )


@contextmanager
def process_group(device: torch.device) -> Iterator[SingleProcess]:
    """Join the processes that torchrun started, within this context. ``device`` is the model's. A
    group that the caller has already initialized is used and not destroyed; it must serve the
    device.

    LostRankError: another process is gone. InputError: two models are on the same GPU.
    """
    rank, size = rank_and_world_size()
    if size == 1:
        yield SingleProcess()
        return
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    initializes = not dist.is_initialized()
    cuda = device.type == "cuda"
    lost = False
    world: ProcessGroup | None = None
    try:
        if cuda:
            torch.cuda.set_device(device)
        if initializes:
            store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            # torchrun keeps its store when it restarts the processes (torch 2.13): without a new
            # prefix, gloo may find the addresses of the dead processes
            distributed.group_name = agree_on_group_name(store, rank, size)
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
            lost = True  # destroying the group would block
            text = _line(error)
            raise LostRankError(
                f"rank {rank} of {size}: another process has ended or does not answer"
                f" ({text:.300}); the same command resumes from the last checkpoint"
            ) from error
        raise
    finally:
        if not lost and dist.is_initialized():
            if initializes:
                dist.destroy_process_group()
            elif world is not None:
                dist.destroy_process_group(world.group)


class CallWrapper(nn.Module):
    """A module that runs calls that use ``model``, so that hooks on it see them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class DataParallel(SingleDevice):
    """Holds a replica of the model in each process (``DistributedDataParallel``). Gradients are
    summed in buckets while the backward of the last micro-batch runs.
    """

    def to(self, dtype: torch.dtype) -> None:
        from torch.nn.parallel import DistributedDataParallel

        super().to(dtype)
        with warnings.catch_warnings():
            # torch 2.13 renamed broadcast_buffers; torch 2.11 only has the old name
            warnings.simplefilter("ignore", FutureWarning)
            self.ddp = DistributedDataParallel(
                CallWrapper(self.model), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.ddp.register_comm_hook(None, _sum_bucket)

    def backward(self, call: Callable[[], Tensor], *, last: bool, factor: float = 1.0) -> Tensor:
        with nullcontext() if last else self.ddp.no_sync():
            loss = self.ddp(call)
            (loss if factor == 1 else loss * factor).backward()
        return loss.detach()


def _sum_bucket(state: None, bucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the processes, as DDP's hook; its default is a mean."""
    del state
    buffer = bucket.buffer()
    wide = buffer.float()
    work = dist.all_reduce(wide, async_op=True)
    assert work is not None  # async
    return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))


class FullySharded(SingleDevice):
    """Shards parameters, gradients and optimizer state over the processes (FSDP2's
    ``fully_shard``): each layer alone, the rest together. ``shard_size``: the number of processes
    that together hold one copy of the model. Gradients are summed over the copies.
    """

    sharded = True

    def __init__(self, model: nn.Module, size: int, shard_size: int):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        super().__init__(model)
        self.root = CallWrapper(model)
        shape = (size,) if shard_size == size else (size // shard_size, shard_size)
        names = ("replicate", "shard")[-len(shape) :]
        device = next(model.parameters()).device.type
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device, shape, mesh_dim_names=names),
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        }
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in [layer for layers in lists for layer in layers]:
            fully_shard(layer, **options)
        # objectives use the head after the layers, also outside of the model's forward
        fully_shard(self.root, reshard_after_forward=False, **options)
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
        for part, part_hooks in zip(self.parts, hooks, strict=True):
            for name, value in part_hooks.items():
                setattr(part, name, value)
        self._reshard()

    def unshard(self) -> None:
        self._gather()

    def _gather(self) -> list[dict[str, Any]]:
        """Gather all parameters. Remove and return the hooks that would shard them again. With the
        hooks, FSDP2 would also learn an order of layers from calls that only one process makes, and
        gather in that order in the next backward: the other processes would wait for ever.
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

    def full_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        return {
            name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        shards = {}
        for name, target in self.model.state_dict().items():
            if name in tensors:
                shards[name] = tensors[name]
                if isinstance(target, DTensor):
                    shards[name] = distribute_tensor(
                        tensors[name], target.device_mesh, target.placements
                    )
        super().load(shards)


def wrap_model(model: nn.Module, options: TrainOptions, world: SingleProcess) -> SingleDevice:
    """Replicate or shard ``model`` as the option `parallel` says. Call it before the optimizer is
    constructed.

    InputError: fsdp with frozen weights; a model that fsdp or hsdp trained before.
    """
    if world.size == 1:
        return SingleDevice(model)
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise InputError(
            "parallel: expected a model that fsdp or hsdp has not trained in this program, got one;"
            " save it and load it again"
        )
    if options.parallel == "ddp":
        return DataParallel(model)
    if not all(p.requires_grad for p in model.parameters()):
        raise InputError(f"parallel: expected ddp with frozen weights, got {options.parallel}")
    return FullySharded(
        model, world.size, node_size() if options.parallel == "hsdp" else world.size
    )
