"""Tests of paged_append beyond its table of cases (cases/paged_append.py)."""

import pytest
import torch
from cases.base import assert_same, clone_leaves, misaligned_copy
from cases.paged_append import case, expected_caches
from contract import (  # noqa: F401
    test_compiles_without_break_or_recompile,
    test_opcheck,
)
from contract_in_place import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, backend, ops, reference

each_cache = pytest.mark.parametrize("int8", [False, True])
VECTORS = {"widths": (16, 16), "pages": (4, 5)}


def test_cpp_is_the_reference():
    cpu = backend.BACKENDS["cpu"]
    assert backend.OPS["paged_append"].load(cpu) is reference.paged_append


@pytest.mark.parametrize("scale", [0.05, torch.tensor(0.05), torch.tensor([0.05])])
def test_one_scale_for_all_heads(op, scale):
    leaves = op.build(op.small["int8"], torch.float32).leaves[:6]
    expected = expected_caches(*leaves, *torch.full((2, 2), 0.05))
    ops.paged_append(*leaves, k_scale=scale, v_scale=scale)
    assert_same(expected, leaves[2:4], "one scale")


@on("cuda")
@each_cache
def test_operands_between_16_bytes(op, kernel, dtype, int8):
    """One of the operands begins there, or a head, a token of it; all else is aligned."""
    call = op.build_for(case(2, 2, 2, **VECTORS, int8=int8), dtype, "cuda", kernel.device)
    for i in range(4):
        for dim in range(4):
            leaves = clone_leaves(call)
            leaves[i] = misaligned_copy(leaves[i], dim)
            call.verify(call.leaves, call.function(*leaves))


@on("cuda")
@each_cache
def test_offsets_beyond_32_bits(op, kernel, int8):
    """Pages are 2^30 elements apart: an index multiplied in 32 bits would write elsewhere."""
    call = op.build_for(case(1, 3, 2, **VECTORS, int8=int8), torch.float16, "cuda", kernel.device)
    k, v, *near, table, positions = call.leaves[:6]
    size = near[0].element_size()
    # mapped only where used
    storage = torch.UntypedStorage((2**31 + 2**13) * size, device=kernel.device)
    base = torch.tensor([], dtype=near[0].dtype, device=kernel.device).set_(storage)
    far = [t.as_strided((3, 4, 2, 16), (2**30, 32, 16, 1)) for t in (base, base[512:])]
    table.copy_(torch.tensor([[2, 1, 0, 0, 0]]))
    positions.copy_(torch.tensor([[0, 3, 4]]))
    for a, b in zip(far, near):
        a.copy_(b[:3])
    expected = [t[:3] for t in expected_caches(*call.leaves)]
    assert_same(expected, call.function(k, v, *far, table, positions, *call.leaves[6:]), "far")


@on("triton")
def test_does_without_values(op, kernel):
    """Tensors without values raise an error for anything that would have to wait for a GPU."""
    leaves = op.build_for(op.small["float"], torch.float32, "triton", "meta").leaves
    backend.OPS["paged_append"].load(backend.BACKENDS["triton"])(*leaves, None, None)


@on("cuda")
def test_the_kernel_refuses_too(op, kernel):
    """The extension may be called without the op's checks."""
    from fastlm.cuda.paged_append import paged_append

    call = op.build_for(op.small["float"], torch.float32, "cuda", kernel.device)
    k, v, *caches, table, positions = call.leaves
    with pytest.raises(ValueError, match="positions: expected entries, one a token 12, got 4"):
        paged_append(k, v, *caches, table, positions[:1], None, None)
    with pytest.raises(ValueError, match="k: expected key heads as its cache 2, got 1"):
        paged_append(k[:, :, :1], v, *caches, table, positions, None, None)
    codes = [c.to(torch.int8) for c in caches]
    with pytest.raises(ValueError, match=r"k_scale: expected one for each key head .* got none"):
        paged_append(k, v, *codes, table, positions, None, None)
    with pytest.raises(ValueError, match="v_cache: expected dtype int8, got float32"):
        ones = torch.ones(2, device=kernel.device)
        paged_append(k, v, codes[0], caches[1], table, positions, ones, ones)


_cache = torch.zeros(1, 4, 2, 8)
_x, _place = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: _x[0]}, r"k: expected 4 dimensions, got \(1, 2, 8\)"),
        (
            {0: torch.zeros(1, 1, 3, 8)},
            r"k: expected torch.float32 \(1, 1, 2, 8\) on cpu .* \(1, 1, 3",
        ),
        (
            {1: torch.zeros(1, 1, 2, 9)},
            r"v: expected torch.float32 \(1, 1, 2, 8\) .* \(1, 1, 2, 9\)",
        ),
        ({1: _x.half()}, "v: expected torch.float32 .* got torch.float16"),
        ({0: _x.int(), 1: _x.int()}, "k: expected a float dtype, got torch.int32"),
        ({2: _cache.half()}, "k_cache: expected .* torch.float32 or int8 .* got torch.float16"),
        ({3: _cache.to(torch.int8)}, "v_cache: expected .* the same for both, got torch.int8"),
        ({3: _cache[:, :3]}, r"v_cache: expected .* got torch.float32 \(1, 3, 2, 8\)"),
        (
            {2: torch.zeros(1, 4, 8, 2).transpose(2, 3)},
            "k_cache: expected elements of a head side by side, got stride 2",
        ),
        (
            {2: _cache[:1].expand(2, -1, -1, -1), 3: _cache[:1].expand(2, -1, -1, -1)},
            "k_cache: expected memory for every element, got an expanded tensor",
        ),
        ({4: _place.float()}, r"block_table: expected int32, .* got torch.float32"),
        ({5: _place[0]}, r"positions: expected int32, 2 dimensions, the first \(1, 1\)"),
        ({"k_scale": 1.0}, r"k_scale: expected None \(torch.float32 cache\), got one"),
        (
            {2: _cache.to(torch.int8), 3: _cache.to(torch.int8), "k_scale": 1.0},
            r"v_scale: expected a number or a tensor \(int8 cache\), got None",
        ),
        ({0: _x.clone().requires_grad_()}, "expected tensors without grad"),
    ],
)
def test_refusals(change, message):
    arguments = [_x, _x, _cache.clone(), _cache.clone(), _place, _place]
    options = {n: value for n, value in change.items() if isinstance(n, str)}
    for i, value in change.items():
        if isinstance(i, int):
            arguments[i] = value
    with pytest.raises(InputError, match=message):
        ops.paged_append(*arguments, **options)
