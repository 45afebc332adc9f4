"""What a case is: plain values that fit on one line; and how it is checked against itself.

A case is a dict. `fuzz_ops.draw` creates one at random. `fuzz_ops.run` builds its tensors and
checks them against float64 with the bounds of the op's own tests; then, to the last bit, against
itself on strided tensors and on another number of threads. Memory that an op allocates is filled
with NaN beforehand and guarded on both sides. Memory between and around the elements of its inputs
is NaN.

The isa "simt" is the op's CUDA kernel on the emulator: instead of the number of threads the order
of the GPU's threads changes, and `host` sets how its host function divides the work.

Rejected: hypothesis, whose shrinking runs out of time on cases of 50 ms and whose database keeps
byte strings that no change of a strategy survives. A line of JSON does survive it.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch
from poison import Guards
from torch import Tensor

from fastlm import backend
from fastlm.cuda import constants

Case = dict[str, Any]


class Built(NamedTuple):
    function: Callable  # maps the leaves to one tensor or a tuple
    leaves: list[Tensor]
    check: Callable[[], None]  # compares the contiguous leaves' results with float64
    differentiable: bool = True
    library: bool = False  # products are torch's: threads and strides may change their last bits
    # All strides yield the same bits: no sum depends on whether vectors fit.
    any_strides: bool = True
    written: tuple[int, ...] = ()  # leaves that the function writes to


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def size(r: Random, most: int, least: int = 0) -> int:
    """Small more often than large, and mostly near multiples of what kernels divide work by."""
    if r.random() < 0.1:
        return least
    n = math.exp(r.uniform(0, math.log(most)))
    if r.random() < 0.6:
        step = r.choice([8, 16, 32, 64, 128, 256])
        n = round(n / step) * step + r.choice([-1, 0, 0, 0, 1])
    return min(most, max(least, int(n)))


def some(r: Random, *choices: Any) -> Any:
    """Return None half of the time, else one of the choices."""
    return r.choice(choices) if r.random() < 0.5 else None


def given(**options: Any) -> Case:
    return {name: value for name, value in options.items() if value not in (None, False)}


def results(built: Built, leaves: list[Tensor], r: Random | None) -> list[Tensor]:
    """Outputs and gradients. `r` also scatters the upstream gradients."""
    leaves = [t.detach() for t in leaves]
    if built.differentiable:
        leaves = [t.requires_grad_(t.is_floating_point()) for t in leaves]
    torch.manual_seed(5)  # for dropout
    outputs = built.function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    reached = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in reached]
    if r:
        upstream = [scattered(t, r) for t in upstream]
    grads = ()
    if reached:
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(reached, wanted, upstream, allow_unused=True)
    return [t.detach() for t in outputs] + [t for t in grads if t is not None]


def scattered(t: Tensor, r: Random, unit: int = 0) -> Tensor:
    """The same values in any memory order, with gaps of NaN in and around every dimension. `unit`:
    elements of the last dimension are contiguous, and each row begins at a multiple of `unit`
    elements.
    """
    order = list(range(t.dim()))
    if r.random() < 0.3:
        r.shuffle(order)
    steps = [r.choice([1, 1, 1, 2]) for _ in order]
    before, after = ([r.choice([0, 0, 1, 3]) for _ in order] for _ in range(2))
    offset = r.choice([0, 1, 5])
    if unit and order:
        order.sort(key=lambda i: i == t.dim() - 1)
        steps[-1], offset = 1, offset * unit
        before[-1], after[-1] = before[-1] * unit, after[-1] * unit + -t.shape[-1] % unit
    shape = [t.shape[i] * steps[i] + before[i] + after[i] for i in order]
    base = torch.empty(offset + math.prod(shape), dtype=t.dtype)[offset:].view(shape)
    view = base.permute([order.index(i) for i in range(t.dim())])
    for i in range(t.dim()):
        view = view.narrow(i, before[i], t.shape[i] * steps[i])
        view = view.unflatten(i, (t.shape[i], steps[i])).select(i + 1, 0)
    return view.copy_(t)


def assert_same(wanted: list[Tensor], got: list[Tensor], what: str) -> None:
    """Assert equality to the last bit; any NaN equals any other."""
    assert len(wanted) == len(got)
    for i, (a, b) in enumerate(zip(wanted, got)):
        assert torch.equal(a.isnan(), b.isnan()), f"{what}: result {i} is NaN elsewhere"
        same = a.nan_to_num(0.0) == b.nan_to_num(0.0)
        assert same.all(), (
            f"{what}: result {i} differs in {int((~same).sum())} of {same.numel()} elements, "
            f"by {(a.double() - b.double()).nan_to_num(0.0).abs().max():.3e}"
        )


def assert_like(wanted: list[Tensor], got: list[Tensor], what: str) -> None:
    """Equality up to two roundings, or up to what reordered sums of logits of 20 change in e^z."""
    for a, b in zip(wanted, got, strict=True):
        near = max(2 * torch.finfo(a.dtype).eps, 1e-4)
        scale = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
        torch.testing.assert_close(
            b, a, rtol=near, atol=near * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def hold(built: Built, case: Case, r: Random, memory: Guards) -> None:
    """Check a case against float64, and against itself where nothing may differ."""
    with torch.random.fork_rng():
        built.check()
    memory.check()
    plain, repeated = list(built.leaves), None
    # One leaf repeats a slice of itself: a stride of 0. The check above does not, because sums of
    # equal terms always round the same way, so float32's error grows with their number, not its
    # root.
    if r.random() < 0.2:
        i = r.randrange(len(plain))
        fits = plain[i].numel() and plain[i].is_floating_point() and plain[i].dim()
        if fits and i not in built.written:
            repeated, dim = i, r.randrange(plain[i].dim())
            plain[i].copy_(plain[i].narrow(dim, 0, 1).expand_as(plain[i]).clone())
    first = results(built, [t.clone() for t in built.leaves], None)
    # GPU kernels access 16 bytes at a time if all rows begin at multiples of 16
    whole = case["isa"] == "simt" and r.random() < 0.5
    units = [
        16 // t.element_size() if whole else int(i in built.written) for i, t in enumerate(plain)
    ]
    apart = [scattered(t, r, unit) for t, unit in zip(plain, units)]
    if repeated is not None:
        t = plain[repeated]
        apart[repeated] = scattered(t.narrow(dim, 0, 1), r, units[repeated]).expand_as(t)
    same = assert_like if built.library or not built.any_strides else assert_same
    same(first, results(built, apart, r), "strides")
    same = assert_like if built.library else assert_same
    with another(case):
        same(first, results(built, built.leaves, None), "threads")
    memory.check()


@contextlib.contextmanager
def kernels(case: Case) -> Iterator[None]:
    """Use the kernels that the case names."""
    if case["isa"] != "simt":
        with backend.use_cpu_isa(case["isa"]), threads(case["threads"]):
            yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.use_backend("simt"))
        stack.enter_context(threads(case["threads"]))
        for place, value in case["host"].items():
            module, _, name = f"fastlm.cuda.{place}".rpartition(".")
            of = constants() if place.isupper() else importlib.import_module(module)
            stack.enter_context(mock.patch.object(of, name, value))
        stack.enter_context(another(case, 0))
        yield


@contextlib.contextmanager
def another(case: Case, i: int = 1) -> Iterator[None]:
    """Use another number of threads, or on the emulator another order of the GPU's threads."""
    if case.get("isa") != "simt":
        with threads((case["threads"] + i - 1) % 4 + 1):
            yield
        return
    emulator_options(seed=case["order"] + i, races=case["races"])
    try:
        yield
    finally:
        emulator_options(seed=case["order"], races=case["races"])


def emulator_options(**options: Any) -> None:
    importlib.import_module("fastlm._simt").set_options(**options)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
