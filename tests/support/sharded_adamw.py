"""A rank of test_sharded_adamw.py: compare AdamW on FSDP2's parameters with a single process.

torchrun --nproc-per-node 2 tests/support/sharded_adamw.py cpu
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate

from fastlm import AdamW, InputError, backend

CASES = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.05},
    "masters": {"master_weights": True, "max_grad_norm": 0.05},
    "8 bits": {"state_bits": 8, "max_grad_norm": 0.05},
    "8 bits, masters": {"state_bits": 8, "master_weights": True},
}


def model(dtype: torch.dtype) -> nn.Module:
    """Make a model with rows that two ranks share evenly, unevenly and (one row) not at all."""
    torch.manual_seed(0)
    wide, odd = (128, 65) if sys.argv[1] == "cpu" else (32, 17)  # interpreted: 0.1 ms an element
    layers = [nn.Linear(64, wide), nn.Tanh(), nn.Linear(wide, odd), nn.Tanh(), nn.Linear(odd, 1)]
    return nn.Sequential(*layers).to(dtype)


def train(net: nn.Module, optimizer: AdamW, steps: range) -> None:
    """Train on the same batch in every rank, so that the mean over ranks changes nothing."""
    for i in steps:
        torch.manual_seed(100 + i)
        x = torch.randn(32, 64).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()


def full_tensor(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def local_tensor(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def compare(name: str, mine: nn.Module, a: AdamW, single: nn.Module, b: AdamW) -> None:
    # 8 bits: a shard begins its own block, so other elements share a scale. Moment and root are off
    # by half a step of 3 bits, in each of five updates of at most lr.
    near = {"rtol": 1e-5, "atol": 1e-6}
    if "8 bits" in name:
        near = {"rtol": 0.0, "atol": 5 * 1e-2 * 2**-3}
    for p, q in zip(mine.parameters(), single.parameters()):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(full_tensor(p).float(), q.float(), **near)
    if a.grad_norm is not None and b.grad_norm is not None:
        assert b.grad_norm > CASES[name]["max_grad_norm"]  # it was clipped
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-2, atol=0.0)


def check(name: str, options: dict) -> None:
    dtype = torch.bfloat16 if "masters" in name else torch.float32
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    single, mine = model(dtype), model(dtype)
    for layer in mine:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(mine, mesh=mesh)
    make = {"lr": 1e-2, **options}
    a, b = AdamW(mine.parameters(), **make), AdamW(single.parameters(), **make)
    for net, optimizer in ((mine, a), (single, b)):
        train(net, optimizer, range(3))
    compare(name, mine, a, single, b)

    # a new optimizer continues from the checkpoint of the old one
    saved = copy.deepcopy(get_optimizer_state_dict(mine, a))
    moments = [v["exp_avg"] for v in saved["state"].values()]
    assert len(moments) == 6 and all(isinstance(m, DTensor) for m in moments)
    resumed = AdamW(mine.parameters(), **make)
    set_optimizer_state_dict(mine, resumed, saved)
    for p in mine.parameters():
        for key, value in a.state[p].items():
            reloaded = resumed.state[p][key]  # codes are plain tensors, one shard each
            assert torch.equal(local_tensor(value), local_tensor(reloaded)), (name, key)
    train(mine, resumed, range(3, 5))
    train(single, b, range(3, 5))
    compare(name, mine, resumed, single, b)


def check_refusal() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    try:
        AdamW([p], max_grad_norm=1.0).step()
    except InputError as error:
        assert str(error).startswith("grad: expected shards or replicas, got (Partial"), error
    else:
        raise AssertionError("expected an error: a sum that is still partial has no norm")


def main() -> None:
    dist.init_process_group("gloo")
    if sys.argv[1] == "triton":
        from interpreter import repair_bfloat16

        repair_bfloat16()
    with backend.use_backend(sys.argv[1]):
        for name, options in CASES.items():
            check(name, options)
            if dist.get_rank() == 0:
                print("equal:", name, flush=True)
        check_refusal()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
