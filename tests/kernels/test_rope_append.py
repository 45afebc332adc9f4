"""Tests of rope_append beyond its table of cases (cases/rope_append.py)."""

import pytest
import torch
from cases.base import clone_leaves, misaligned_copy
from cases.rope_append import case
from contract import (  # noqa: F401
    test_compiles_without_break_or_recompile,
    test_opcheck,
)
from contract_in_place import *  # noqa: F403

from fastlm.ops.rope_append import rope_append


def test_operands_between_16_bytes(op, kernel, dtype):
    """One of the operands begins there, or a head, a token of it; all else is aligned."""
    call = op.build_for(
        case(2, 2, 4, 2, widths=(16, 16, 16), pages=(4, 3)), dtype, "cuda", kernel.device
    )
    for i in range(7):
        for dim in range(call.leaves[i].dim()):
            leaves = clone_leaves(call)
            leaves[i] = misaligned_copy(leaves[i], dim)
            call.verify(call.leaves, call.function(*leaves))


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: slice(0, 2)}, "k: expected sequences 3, got 2"),
        ({8: slice(0, 2)}, "positions: expected entries, one a token 3, got 2"),
        ({7: slice(0, 2)}, "block_table: expected rows 3, got 2"),
        ({4: slice(0, 2)}, "sin: expected rows as cos 24, got 2"),
        ({3: slice(0, 0), 4: slice(0, 0)}, r"cos: expected rows of an even number up to 16, got 0"),
        ({6: slice(0, 4)}, "v_cache: expected pages as k_cache 11, got 4"),
        ({6: (slice(None), slice(0, 4))}, "v_cache: expected page size of k_cache 8, got 4"),
        ({5: torch.Tensor.half}, "k_cache: expected dtype float32, got float16"),
        ({3: torch.Tensor.half}, "cos: expected dtype float32, got float16"),
    ],
)
def test_refusals(op, kernel, change, message):
    arguments = op.build_for(op.small[""], torch.float32, "cuda", kernel.device).leaves
    for i, how in change.items():
        arguments[i] = how(arguments[i]) if callable(how) else arguments[i][how]
    with pytest.raises(ValueError, match=message):
        rope_append(*arguments)
