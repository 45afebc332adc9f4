"""The tests that every op passes on every kernel, from its table of cases (cases/).
`tests/kernels/test_<op>.py` takes them in by `from contract import *` and adds what is particular
to the op.
"""

from collections.abc import Callable
from random import Random

import torch
from cases.base import (
    Built,
    Row,
    assert_like,
    assert_same,
    check,
    gets_gradient,
    results,
    scattered,
)
from compiled import assert_compiles_once
from fuzz_cases import threads
from on_kernels import thread_order
from torch.utils._python_dispatch import TorchDispatchMode


def rows(which: Callable[[Row], bool]) -> Callable:
    """Run a test on these rows of its op's table, on the kernels that have an edge there."""

    def mark(test: Callable) -> Callable:
        test.__dict__["rows"] = which
        return test

    return mark


class Recorded(TorchDispatchMode):
    """A call of each of fastlm's operators with all its arguments, and one without some. Those of a
    backward have no derivative.
    """

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            has_derivative = not func.__name__.partition(".")[0].endswith("_backward")
            given = [
                t.detach().requires_grad_(has_derivative and t.requires_grad)
                if isinstance(t, torch.Tensor)
                else t
                for t in args
            ]
            self.calls.setdefault((func, any(t is None for t in args)), given)
        return func(*args, **(kwargs or {}))


@rows(lambda row: True)
def test_matches_float64(op, row, kernel, dtype):
    """Forward and backward, against float64 and plain torch in the same dtype."""
    check(op.built(row.case, dtype, kernel.language, kernel.device))


@rows(lambda row: row.bits)
def test_strides_do_not_matter(op, row, kernel, dtype):
    """Operands and upstream gradients in any memory order, between gaps of NaN."""
    built = op.built(row.case, dtype, kernel.language, kernel.device)
    first = results(built, [t.clone() for t in built.leaves])
    same = assert_same if built.any_strides and not built.library else assert_like
    for seed in range(3):
        r = Random(seed)
        # GPU kernels access 16 bytes at a time if all rows begin at multiples of 16
        units = [16 // t.element_size() if seed == 2 else 0 for t in built.leaves]
        apart = [scattered(t, r, unit) for t, unit in zip(built.leaves, units)]
        same(first, results(built, apart, r), "strides")


@rows(lambda row: row.bits)
def test_repeats_bit_for_bit(op, row, kernel, dtype):
    """Also in another order of a GPU's threads."""
    built = op.built(row.case, dtype, kernel.language, kernel.device)
    first = results(built, built.leaves)
    if kernel.language == "cuda" and kernel.device == "cpu":
        thread_order(int(kernel.way) + 20)
    assert_same(first, results(built, built.leaves), "again")


@rows(lambda row: row.split)
def test_same_bits_on_any_number_of_threads(op, row, kernel, dtype):
    """By design: shares follow from the shapes, or a row's sum does not depend on its share."""
    built, first = op.built(row.case, dtype, kernel.language), None
    for n in (1, 2, 3, 4, 2):
        with threads(n):
            found = results(built, built.leaves)
        first = first or found
        assert_same(first, found, f"{n} threads")


def test_opcheck(op):
    """Every operator that the op calls, forward and backward."""
    with Recorded() as recorded:
        for case in op.small.values():
            built = op.build(case, torch.float32)
            results(built, built.leaves)
    assert recorded.calls
    for (function, _), args in recorded.calls.items():
        torch.library.opcheck(function, args)


def differentiable(built: Built) -> tuple[torch.Tensor, ...]:
    for i, t in enumerate(built.leaves):
        t.requires_grad_(built.differentiable and gets_gradient(t, i, built.constant))
    return tuple(built.leaves)


def test_gradcheck_of_the_reference(op):
    for name, case in op.small.items():
        built = op.build(case, torch.float64)

        def seeded(*leaves, built=built):
            torch.manual_seed(5)  # for dropout
            return built.function(*leaves)

        assert torch.autograd.gradcheck(seeded, differentiable(built)), name


def test_compiles_without_break_or_recompile(op):
    for cases in op.batches.values():
        builds = [op.build(case, torch.float32) for case in cases]
        assert_compiles_once(builds[0].function, [differentiable(built) for built in builds])


__all__ = [name for name in globals() if name.startswith("test_")]
