"""The tests that every op passes on every kernel, from its table of cases (cases/).
`tests/kernels/test_<op>.py` imports them by `from contract import *` and adds the op's own tests.
"""

from collections.abc import Callable
from random import Random

import torch
from cases.base import (
    OpCall,
    Row,
    assert_like,
    assert_same,
    check,
    clone_leaves,
    needs_gradient,
    results,
    scattered_copy,
)
from compiled import assert_compiles_once
from fuzz_cases import threads
from on_kernels import thread_order
from torch.utils._python_dispatch import TorchDispatchMode


def rows(which: Callable[[Row], bool]) -> Callable:
    """Run a test on these rows of its op's table, on the kernels that a row names."""

    def mark(test: Callable) -> Callable:
        test.__dict__["rows"] = which
        return test

    return mark


class CallRecorder(TorchDispatchMode):
    """Record a call of each of fastlm's operators with all its arguments, and one that leaves some
    out. The arguments of a backward get no gradient.
    """

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            has_derivative = not func.__name__.partition(".")[0].endswith("_backward")
            arguments = [
                t.detach().requires_grad_(has_derivative and t.requires_grad)
                if isinstance(t, torch.Tensor)
                else t
                for t in args
            ]
            self.calls.setdefault((func, any(t is None for t in args)), arguments)
        return func(*args, **(kwargs or {}))


@rows(lambda row: True)
def test_matches_float64(op, row, kernel, dtype):
    """Compare forward and backward with float64, and with plain torch in the same dtype."""
    check(op.build_for(row.case, dtype, kernel.language, kernel.device))


@rows(lambda row: row.bits)
def test_strides_do_not_matter(op, row, kernel, dtype):
    """Pass operands and upstream gradients in any memory order, between gaps of NaN."""
    call = op.build_for(row.case, dtype, kernel.language, kernel.device)
    first = results(call, clone_leaves(call))
    same = assert_same if call.any_strides and not call.library else assert_like
    for seed in range(3):
        r = Random(seed)
        # GPU kernels access 16 bytes at a time if all rows begin at multiples of 16
        units = [16 // t.element_size() if seed == 2 else 0 for t in call.leaves]
        strided = [scattered_copy(t, r, unit) for t, unit in zip(call.leaves, units)]
        same(first, results(call, strided, r), "strides")


@rows(lambda row: row.bits)
def test_repeats_bit_for_bit(op, row, kernel, dtype):
    """Expect the same bits also in another order of a GPU's threads."""
    call = op.build_for(row.case, dtype, kernel.language, kernel.device)
    first = results(call, clone_leaves(call))
    if kernel.language == "cuda" and kernel.device == "cpu":
        thread_order(int(kernel.variant) + 20)
    assert_same(first, results(call, call.leaves), "repetition")


@rows(lambda row: row.split)
def test_same_bits_on_any_number_of_threads(op, row, kernel, dtype):
    """Threads divide work by the shapes alone, or a row's sum does not depend on the division."""
    call, first = op.build_for(row.case, dtype, kernel.language), None
    for n in (1, 2, 3, 4, 2):
        with threads(n):
            actual = results(call, clone_leaves(call))
        first = first or actual
        assert_same(first, actual, f"{n} threads")


def test_opcheck(op):
    """Check every operator that the op calls, forward and backward."""
    with CallRecorder() as recorded:
        for case in op.small.values():
            call = op.build(case, torch.float32)
            results(call, call.leaves)
    assert recorded.calls
    for (function, _), args in recorded.calls.items():
        torch.library.opcheck(function, args)


def differentiable(call: OpCall) -> tuple[torch.Tensor, ...]:
    for i, t in enumerate(call.leaves):
        t.requires_grad_(call.differentiable and needs_gradient(t, i, call.constant))
    return tuple(call.leaves)


def test_gradcheck_of_the_reference(op):
    for name, case in op.small.items():
        call = op.build(case, torch.float64)

        def seeded(*leaves, call=call):
            torch.manual_seed(5)  # for dropout
            return call.function(*leaves)

        assert torch.autograd.gradcheck(seeded, differentiable(call)), name


def test_compiles_without_break_or_recompile(op):
    for cases in op.batches.values():
        calls = [op.build(case, torch.float32) for case in cases]
        assert_compiles_once(calls[0].function, [differentiable(call) for call in calls])


__all__ = [name for name in globals() if name.startswith("test_")]
