"""The tests that an op without gradient passes which writes into its arguments, from its table of
cases, as contract.py has them for the others.
"""

from random import Random

import torch
from cases.base import assert_same, check, copies, results, scattered
from contract import rows, test_repeats_bit_for_bit  # noqa: F401
from torch import Tensor

from fastlm import backend


def gaps(t: Tensor) -> Tensor:
    """What a tensor from `scattered` has around and between its elements."""
    base = t._base
    assert base is not None
    between = torch.ones_like(base, dtype=torch.bool)
    start = t.storage_offset() - base.storage_offset()
    between.as_strided(t.shape, t.stride(), start).fill_(False)
    return base[between]


@rows(lambda row: True)
def test_matches_its_definition(op, row, kernel, dtype):
    check(op.built(row.case, dtype, kernel.language, kernel.device))


def test_the_reference_matches_its_definition(op, dtype):
    with backend.use_backend("reference"):
        for row in op.rows.values():
            check(op.built(row.case, dtype, "cpu"))


@rows(lambda row: row.bits)
def test_strides_do_not_matter(op, row, kernel, dtype):
    """Arguments in any memory order that they may have, and nothing is written between them."""
    built = op.built(row.case, dtype, kernel.language, kernel.device)
    first = results(built, copies(built))
    for seed in range(4):
        r = Random(seed)
        # GPU kernels access 16 bytes at a time if all rows begin at multiples of 16
        units = [
            16 // t.element_size() if seed == 3 else int(i in built.dense)
            for i, t in enumerate(built.leaves)
        ]
        apart = [scattered(t, r, unit) for t, unit in zip(built.leaves, units)]
        assert_same(first, results(built, apart), "strides")
        for i, t in enumerate(apart):
            poison = gaps(t)
            untouched = (
                poison.isnan() if t.is_floating_point() else poison == torch.iinfo(t.dtype).max
            )
            assert untouched.all(), f"written beside leaf {i}"


__all__ = [name for name in globals() if name.startswith("test_")]
