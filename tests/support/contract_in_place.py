"""The tests of an op that writes into its arguments and has no gradient, from its table of cases.
contract.py has those of the other ops.
"""

from random import Random

import torch
from cases.base import assert_same, check, clone_leaves, results, scattered_copy
from contract import rows, test_repeats_bit_for_bit  # noqa: F401
from torch import Tensor

from fastlm import backend


def gaps(t: Tensor) -> Tensor:
    """Return the memory around and between the elements of a tensor from `scattered_copy`."""
    base = t._base
    assert base is not None
    between = torch.ones_like(base, dtype=torch.bool)
    start = t.storage_offset() - base.storage_offset()
    between.as_strided(t.shape, t.stride(), start).fill_(False)
    return base[between]


@rows(lambda row: True)
def test_matches_its_definition(op, row, kernel, dtype):
    check(op.build_for(row.case, dtype, kernel.language, kernel.device))


def test_the_reference_matches_its_definition(op, dtype):
    with backend.use_backend("reference"):
        for row in op.rows.values():
            check(op.build_for(row.case, dtype, "cpu"))


@rows(lambda row: row.bits)
def test_strides_do_not_matter(op, row, kernel, dtype):
    """Pass arguments in any memory order that they may have. Nothing is written between them."""
    call = op.build_for(row.case, dtype, kernel.language, kernel.device)
    first = results(call, clone_leaves(call))
    for seed in range(4):
        r = Random(seed)
        # GPU kernels access 16 bytes at a time if all rows begin at multiples of 16
        units = [
            16 // t.element_size() if seed == 3 else int(i in call.dense)
            for i, t in enumerate(call.leaves)
        ]
        strided = [scattered_copy(t, r, unit) for t, unit in zip(call.leaves, units)]
        assert_same(first, results(call, strided), "strides")
        for i, t in enumerate(strided):
            poison = gaps(t)
            untouched = (
                poison.isnan() if t.is_floating_point() else poison == torch.iinfo(t.dtype).max
            )
            assert untouched.all(), f"leaf {i}: expected its gaps to be unchanged"


__all__ = [name for name in globals() if name.startswith("test_")]
