"""Poison new memory with NaN, and guard it on both sides, so that tests notice stray accesses."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MAKERS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
GUARD = 192  # bytes on each side: three cache lines, wider than any store of a kernel


def poison(t: Tensor) -> Tensor:
    """Fill `t` with NaN, or with the largest integer."""
    if torch.compiler.is_compiling() or type(t) is not Tensor or t.is_meta:
        return t
    if t.is_floating_point():
        return t.fill_(float("nan"))
    return t.fill_(1 if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


class Guards:
    """The guards around all storages that were allocated since the last check."""

    def __init__(self) -> None:
        self.edges: list[Tensor] = []

    def guard(self, t: Tensor) -> Tensor:
        """Replace t by a poisoned tensor like it, between two guards."""
        if type(t) is not Tensor or t.device.type != "cpu" or t.layout != torch.strided:
            return t
        used = t.untyped_storage().nbytes()
        storage = torch.UntypedStorage(used + 2 * GUARD)
        with torch.no_grad():
            storage_bytes = torch.tensor([], dtype=torch.uint8, device="cpu").set_(storage)
            self.edges += [
                storage_bytes[:GUARD].fill_(0xA5),
                storage_bytes[GUARD + used :].fill_(0xA5),
            ]
            inner = torch.tensor([], dtype=t.dtype, device="cpu")
            inner.set_(storage, GUARD // t.element_size(), t.shape, t.stride())
            return poison(inner).requires_grad_(t.requires_grad)

    def check(self) -> None:
        assert all((edge == 0xA5).all() for edge in self.edges), "written outside an allocation"
        self.edges.clear()


@contextlib.contextmanager
def patch_allocations(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `change` to the results of ``torch.empty`` and its relatives."""

    def wrap(make):
        return lambda *args, **kwargs: change(make(*args, **kwargs))

    originals = [(owner, name, getattr(owner, name)) for owner, name in MAKERS]
    for owner, name, make in originals:
        setattr(owner, name, wrap(make))
    try:
        yield
    finally:
        for owner, name, make in originals:
            setattr(owner, name, make)


@contextlib.contextmanager
def guarded_memory() -> Iterator[Guards]:
    guards = Guards()
    with patch_allocations(guards.guard):
        yield guards
