"""Check a fuzz case: plain values that fit on one line.

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
from collections.abc import Iterator
from random import Random
from typing import Any
from unittest import mock

import torch
from cases.base import (
    Case,
    OpCall,
    assert_like,
    assert_same,
    check,
    clone_leaves,
    results,
    scattered_copy,
)
from poison import Guards

from fastlm import backend
from fastlm.cuda import constants


def check_case(call: OpCall, case: Case, r: Random, memory: Guards) -> None:
    """Check a case against float64, and against itself where nothing may differ."""
    with torch.random.fork_rng():
        check(call)
    memory.check()
    plain, repeated = list(call.leaves), None
    # One leaf repeats a slice of itself: a stride of 0. The check above does not, because sums of
    # equal terms always round the same way, so float32's error grows with their number, not its
    # root.
    if r.random() < 0.2:
        i = r.randrange(len(plain))
        fits = plain[i].numel() and plain[i].is_floating_point() and plain[i].dim()
        if fits and i not in call.dense:
            repeated, dim = i, r.randrange(plain[i].dim())
            plain[i].copy_(plain[i].narrow(dim, 0, 1).expand_as(plain[i]).clone())
    first = results(call, clone_leaves(call))
    # GPU kernels access 16 bytes at a time if all rows begin at multiples of 16
    aligned = case["isa"] == "simt" and r.random() < 0.5
    units = [
        16 // t.element_size() if aligned else int(i in call.dense) for i, t in enumerate(plain)
    ]
    strided = [scattered_copy(t, r, unit) for t, unit in zip(plain, units)]
    if repeated is not None:
        t = plain[repeated]
        strided[repeated] = scattered_copy(t.narrow(dim, 0, 1), r, units[repeated]).expand_as(t)
    same = assert_like if call.library or not call.any_strides else assert_same
    same(first, results(call, strided, r), "strides")
    same = assert_like if call.library else assert_same
    with other_schedule(case):
        same(first, results(call, call.leaves), "threads")
    memory.check()


@contextlib.contextmanager
def use_kernels(case: Case) -> Iterator[None]:
    """Use the case's kernels."""
    if case["isa"] != "simt":
        with backend.use_cpu_isa(case["isa"]), threads(case["threads"]):
            yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.use_backend("simt"))
        stack.enter_context(threads(case["threads"]))
        for setting, value in case["host"].items():
            module, _, name = f"fastlm.cuda.{setting}".rpartition(".")
            owner = constants() if setting.isupper() else importlib.import_module(module)
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(other_schedule(case, 0))
        yield


@contextlib.contextmanager
def other_schedule(case: Case, i: int = 1) -> Iterator[None]:
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
