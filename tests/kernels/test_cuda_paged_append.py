"""paged_append's CUDA kernel against the loop of test_paged_append, on the emulator if there is no
GPU.
"""

import pytest
import torch
from test_paged_append import assert_left_out, case, wanted

from fastlm import ops


# with vectors and element by element; several blocks per token; one token, many
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 2, 64, 64, 16), (2, 7, 3, 40, 24, 5), (1, 4, 2, 33, 7, 1), (5, 1, 9, 128, 128, 8)],
    ids=str,
)
@pytest.mark.parametrize("int8", [False, True])
def test_is_a_loop_over_tokens(cuda, dtype, shape, int8):
    arguments, scales = case(dtype, *shape, per=5, int8=int8, device=cuda)
    expected = wanted(arguments, scales)
    ops.paged_append(*arguments, **scales)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], expected))


def test_rounds_to_even_and_saturates(cuda):
    k = torch.tensor([0.5, 1.5, -0.5, -2.5, 200.0, -200.0, torch.inf, -torch.inf], device=cuda)
    cache = torch.zeros(1, 1, 1, 8, dtype=torch.int8, device=cuda)
    zero = torch.zeros(1, 1, dtype=torch.int32, device=cuda)
    x = k.view(1, 1, 1, 8)
    ops.paged_append(x, x, cache, cache.clone(), zero, zero, k_scale=1.0, v_scale=1.0)
    assert cache.flatten().tolist() == [0, 2, 0, -2, 127, -127, 127, -127]


@pytest.mark.parametrize("int8", [False, True])
def test_strided(cuda, dtype, int8):
    """k and v from one projection, interleaved caches, a table that is a view."""
    arguments, scales = case(dtype, 2, 3, 2, 16, 16, 4, per=5, int8=int8, device=cuda)
    table, positions = arguments[4:]
    k, v = torch.randn(2, 2, 2, 3, 16, device=cuda).to(dtype).transpose(2, 3).unbind(1)
    both = torch.zeros(12, 4, 2, 2, 16, dtype=torch.int8 if int8 else dtype, device=cuda)
    k_cache, v_cache = both.unbind(2)
    wide = torch.full((2, 10), 2**31 - 1, dtype=torch.int32, device=cuda)
    wide[:, ::2] = table
    k = k.transpose(2, 3).contiguous().transpose(2, 3)  # the elements of a head are strided
    expected = wanted([k, v, k_cache, v_cache, table, positions], scales)
    ops.paged_append(k, v, k_cache, v_cache, wide[:, ::2], positions, **scales)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


@pytest.mark.parametrize("int8", [False, True])
def test_offsets_beyond_32_bits(cuda, int8):
    """Pages are 2^30 elements apart: an index multiplied in 32 bits would write elsewhere."""
    (k, v, near_k, near_v, _, _), scales = case(
        torch.float16, 1, 3, 2, 16, 16, 4, per=5, int8=int8, device=cuda
    )
    size = near_k.element_size()
    storage = torch.UntypedStorage((2**31 + 2**13) * size, device=cuda)  # mapped only where used
    base = torch.tensor([], dtype=near_k.dtype, device=cuda).set_(storage)
    k_cache, v_cache = (t.as_strided((3, 4, 2, 16), (2**30, 32, 16, 1)) for t in (base, base[512:]))
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=cuda)
    positions = torch.tensor([[0, 3, 4]], dtype=torch.int32, device=cuda)
    for far, near in ((k_cache, near_k), (v_cache, near_v)):
        far.copy_(near[:3])
    ops.paged_append(k, v, near_k, near_v, table, positions, **scales)
    ops.paged_append(k, v, k_cache, v_cache, table, positions, **scales)
    assert torch.equal(k_cache, near_k[:3]) and torch.equal(v_cache, near_v[:3])


@pytest.mark.parametrize("int8", [False, True])
def test_tokens_between_16_bytes(cuda, dtype, int8):
    """The first token is aligned to 16 bytes, the next one is not."""
    (_, *others), scales = case(dtype, 1, 3, 2, 16, 16, 4, per=5, int8=int8, device=cuda)
    k = torch.randn(1, 3, 33, device=cuda).to(dtype)[..., :32].unflatten(-1, (2, 16))
    expected = wanted([k, *others], scales)
    ops.paged_append(k, *others, **scales)
    assert torch.equal(others[1], expected[0]) and torch.equal(others[2], expected[1])


@pytest.mark.parametrize("int8", [False, True])
def test_tokens_without_a_place_are_left_out(cuda, int8):
    """Negative positions, positions past the table, pages outside the cache: nothing is written."""
    arguments, scales = case(torch.bfloat16, 4, 1, 2, 16, 16, 4, per=5, int8=int8, device=cuda)
    table, positions = arguments[4:]
    # no memory past the table's last row could be read as a page
    positions[0], positions[1], positions[2], positions[3] = -1, 3, 2, 20
    table[1, 0], table[2, 0] = arguments[2].shape[0], -1
    before = [t.clone() for t in arguments[2:4]]
    ops.paged_append(*arguments, **scales)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], before))


@pytest.mark.parametrize("place", [4, 5], ids=["block_table", "positions"])
def test_numbers_beyond_32_bits_are_left_out(cuda, place):
    assert_left_out(case(torch.float16, 2, 3, 2, 16, 16, 4, device=cuda)[0], place, 2**32)


def test_paged_attention_reads_it(cuda):
    arguments, scales = case(torch.float16, 2, 9, 2, 32, 32, 4, per=5, int8=True, device=cuda)
    k, v, k_cache, v_cache, table, _ = arguments
    positions = torch.arange(9, device=cuda).int().expand(2, 9)
    ops.paged_append(k, v, k_cache, v_cache, table, positions, **scales)
    lens = torch.full((2,), 9, dtype=torch.int32, device=cuda)
    q = torch.randn(2, 1, 4, 32, device=cuda).half()
    out = ops.paged_attention(q, k_cache, v_cache, table, lens, **scales)
    pages = torch.arange(2, device=cuda).int()[:, None]
    steps = [s[:, None] for s in scales.values()]
    rounded = [((x / s).float().round().clamp(-127, 127) * s).half() for x, s in zip((k, v), steps)]
    torch.testing.assert_close(
        out, ops.paged_attention(q, *rounded, pages, lens), atol=2e-2, rtol=1e-2
    )


def test_the_kernel_refuses_too(cuda):
    """For callers of the extension that skip the op's checks."""
    from fastlm.cuda.paged_append import paged_append

    (k, v, *caches, table, positions), _ = case(torch.float32, device=cuda)
    with pytest.raises(ValueError, match="positions: wanted entries, one a token 12, got 4"):
        paged_append(k, v, *caches, table, positions[:1], None, None)
    with pytest.raises(ValueError, match="k: wanted key heads as its cache 2, got 1"):
        paged_append(k[:, :, :1], v, *caches, table, positions, None, None)
    codes = [c.to(torch.int8) for c in caches]
    with pytest.raises(ValueError, match=r"k_scale: wanted one for each key head .* got none"):
        paged_append(k, v, *codes, table, positions, None, None)
    with pytest.raises(ValueError, match="v_cache: wanted dtype int8, got float32"):
        one = torch.ones(2, device=cuda)
        paged_append(k, v, codes[0], caches[1], table, positions, one, one)
