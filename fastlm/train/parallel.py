"""How the processes of a training hold its model: whole in each (DDP), or each a shard (FSDP2).

Gradients are summed over the processes, because a loss is already divided by the items of the whole
step. They are summed in float32, whatever their dtype: a sum of 1,024 in bfloat16 would lose bits.

Both wrap `Root`, a module whose forward is a call of the objective. Their hooks thus fire once per
micro-batch, whichever methods of the model an objective uses. Rejected: wrapping the model and
registering the methods (``hidden``, ``logprobs``, ...) one by one.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.torchrun import node_size
from fastlm.train.distributed import SingleProcess
from fastlm.train.options import TrainOptions

T = TypeVar("T")
# Where nn.Module keeps the hooks of `fully_shard`
HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"
)  # fmt: skip


class Root(nn.Module):
    """Runs a call that uses ``model``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class SingleDevice:
    """A model in one process."""

    sharded = False

    def __init__(self, model: nn.Module):
        self.model = model

    def to(self, dtype: torch.dtype) -> None:
        """Cast the model. Call it after the optimizer was made."""
        self.model.to(dtype)

    def run(self, call: Callable[[], T]) -> T:
        """Run a call that uses the model without a backward."""
        return call()

    def backward(self, call: Callable[[], Tensor], *, last: bool, factor: float = 1.0) -> Tensor:
        """Add the gradient of a loss. Return the loss. ``last``: of the step."""
        loss = call()
        loss.backward()
        return loss.detach()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context: all parameters are plain tensors, for anything but training."""
        yield

    def keep_gathered(self) -> None:
        """Leave a model of plain parameters, at the end of the training."""

    def full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as plain ones."""
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Undo `full` of some of the model's ``state_dict()``, in place."""
        self.model.load_state_dict(tensors, strict=False)


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
                Root(self.model), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.ddp.register_comm_hook(None, _summed)

    def backward(self, call: Callable[[], Tensor], *, last: bool, factor: float = 1.0) -> Tensor:
        with nullcontext() if last else self.ddp.no_sync():
            loss = self.ddp(call)
            (loss if factor == 1 else loss * factor).backward()
        return loss.detach()


def _summed(state: None, bucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for a bucket: a sum, where its own default is a mean."""
    import torch.distributed as dist

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
        self.root = Root(model)
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
    def gathered(self) -> Iterator[None]:
        hooks = self._gather()
        yield
        for part, kept in zip(self.parts, hooks, strict=True):
            for name, own in kept.items():
                setattr(part, name, own)
        self._reshard()

    def keep_gathered(self) -> None:
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
            "parallel: wanted a model that fsdp or hsdp did not train before in this program, got"
            " one; save it, and load it again"
        )
    if options.parallel == "ddp":
        return DataParallel(model)
    if not all(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"parallel: wanted ddp where a part of the weights is frozen, got {options.parallel}"
        )
    return FullySharded(
        model, world.size, node_size() if options.parallel == "hsdp" else world.size
    )
