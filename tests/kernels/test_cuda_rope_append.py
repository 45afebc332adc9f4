"""rope and paged_append in one launch against two launches, on the emulator if there is no GPU."""

import pytest
import torch

from fastlm import backend, ops
from fastlm.ops.rope_append import rope_append


def case(device, dtype, b, s, heads, hkv, d, dv, turned, page_size, per=3):
    """q, k, v of one projection; tables; poisoned caches, a table of shuffled pages, positions."""
    widths = [heads * d, hkv * d, hkv * dv]
    q, k, v = torch.randn(b, s, sum(widths), device=device).to(dtype).split(widths, -1)
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, heads), (k, hkv), (v, hkv)))
    angles = torch.arange(per * page_size, device=device)[:, None] * torch.rand(turned // 2)
    tables = [f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin)]
    pages = b * per + 2
    caches = [
        torch.full((pages, page_size, hkv, n), 7.0, dtype=dtype, device=device) for n in (d, dv)
    ]
    block_table = torch.randperm(pages, device=device)[: b * per].view(b, per).int()
    start = torch.randint(0, per * page_size - s + 1, (b, 1), device=device)
    return q, k, v, *tables, *caches, block_table, (start + torch.arange(s, device=device)).int()


def wanted(q, k, v, cos, sin, k_cache, v_cache, block_table, positions):
    caches, at = (k_cache.clone(), v_cache.clone()), positions.long().clamp(0, len(cos) - 1)
    turned = ops.rope(q.transpose(1, 2), k.transpose(1, 2), cos[at], sin[at])
    q, k = (t.transpose(1, 2) for t in turned)
    with backend.use_backend("reference"):
        ops.paged_append(k, v, *caches, block_table, positions)
    return q, *caches


def assert_same(arguments):
    expected = wanted(*arguments)
    copies = [t.clone() for t in arguments]
    with backend.use_backend("reference"):
        defined = rope_append(*copies), *copies[5:7]
    for got, want in zip(defined, expected):
        torch.testing.assert_close(got, want)
    q = rope_append(*arguments)
    eps = torch.finfo(q.dtype).eps  # nvcc fuses products and sums in its own way
    for got, want in zip((q, arguments[5]), expected):
        torch.testing.assert_close(got, want, rtol=eps, atol=eps)
    assert torch.equal(arguments[6], expected[2])


# in vectors and element by element; partial rotation of a head; several blocks per token; many
# tokens
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 6, 2, 64, 64, 64, 16),
        (3, 2, 3, 1, 40, 24, 16, 5),
        (1, 3, 2, 2, 22, 9, 10, 1),
        (1, 1, 64, 8, 128, 128, 128, 32),
        (2, 9, 4, 4, 32, 32, 8, 7),
    ],
    ids=str,
)
def test_is_rope_and_append(cuda, dtype, shape):
    assert_same(case(cuda, dtype, *shape))


def test_unaligned_and_rows_as_pages(cuda, dtype):
    q, k, v, cos, sin, _, _, _, positions = case(cuda, dtype, 3, 1, 4, 2, 16, 16, 16, 8)
    data = torch.full((2, 3, 2, 24, 16), 7.0, dtype=dtype, device=cuda)  # laid out like a cache
    keys, values = (t.transpose(1, 2) for t in data.unbind())
    pages = torch.arange(3, dtype=torch.int32, device=cuda)[:, None]
    assert_same((q, k, v, cos, sin, keys, values, pages, positions))
    q = torch.randn(q.numel() + 1, device=cuda).to(dtype)[1:].view(q.shape)
    assert_same((q, k, v, cos, sin, keys, values, pages, positions))


def test_tokens_without_a_place_are_left_out(cuda):
    """q is rotated nevertheless, by the nearest row of the tables."""
    arguments = case(cuda, torch.float32, 4, 1, 4, 2, 16, 16, 16, 4)
    table, positions = arguments[-2:]
    positions[:, 0] = torch.tensor([-1, 12, 3, 2], dtype=torch.int32)
    table[2, 0], table[3, 0] = len(arguments[5]), -1
    assert_same(arguments)
    assert (arguments[5] == 7).all() and (arguments[6] == 7).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: slice(0, 2)}, "k: wanted sequences 3, got 2"),
        ({8: slice(0, 2)}, "positions: wanted entries, one a token 3, got 2"),
        ({7: slice(0, 2)}, "block_table: wanted rows 3, got 2"),
        ({4: slice(0, 2)}, "sin: wanted rows as cos 24, got 2"),
        ({3: slice(0, 0), 4: slice(0, 0)}, r"cos: wanted rows of an even number up to 16, got 0"),
        ({6: slice(0, 4)}, "v_cache: wanted pages as k_cache 11, got 4"),
        ({6: (slice(None), slice(0, 4))}, "v_cache: wanted page size of k_cache 8, got 4"),
        ({5: torch.Tensor.half}, "k_cache: wanted dtype float32, got float16"),
        ({3: torch.Tensor.half}, "cos: wanted dtype float32, got float16"),
    ],
)
def test_refusals(cuda, change, message):
    arguments = list(case(cuda, torch.float32, 3, 1, 4, 2, 16, 16, 16, 8))
    for i, how in change.items():
        arguments[i] = how(arguments[i]) if callable(how) else arguments[i][how]
    with pytest.raises(ValueError, match=message):
        rope_append(*arguments)


def test_opcheck():
    arguments = case("cpu", torch.float32, 3, 1, 4, 2, 16, 16, 8, 8)
    torch.library.opcheck(torch.ops.fastlm.rope_append, arguments)
