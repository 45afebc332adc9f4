"""paged_attention's Triton kernels against float64, interpreted if there is no GPU."""

import pytest
import test_paged_attention
import torch
from cases.attention import far_apart
from test_paged_attention import OPTIONS, assert_paged_near, cache

from fastlm import ops
from fastlm.kernels import attention_forward as kernel


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_matches_float64(triton, page_size, queries, options):
    q = torch.randn(3, queries, 4, 40)
    parts = cache([53, 0, 130], page_size, 2, 40, 24, q.dtype)
    assert_paged_near(q, *parts, what="triton", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_match_float64(triton, dtype):
    q = torch.randn(2, 3, 4, 40).to(dtype)
    parts = cache([53, 130], 16, 2, 40, 24, q.dtype)
    assert_paged_near(q, *parts, what="triton", causal=True)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("scales", [(0.02, 0.03), (torch.tensor([0.02, 0.01]), torch.tensor(0.03))])
def test_int8_cache(triton, dtype, queries, scales):
    q = torch.randn(2, queries, 4, 64).to(dtype)
    assert_paged_near(
        q, *cache([90, 70], 16, 2, 64, 64, torch.int8), what="triton", causal=True,
        k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_splits_of_any_length(triton, options, monkeypatch):
    """Four programs per sequence whatever its length, so some of them have no keys."""
    monkeypatch.setattr(kernel, "_splits", lambda *_: 4)
    q = torch.randn(4, 1, 4, 16)
    parts = cache([300, 1, 0, 40], 16, 2, 16, 16, q.dtype)
    assert_paged_near(q, *parts, what="splits", **options)


def test_strided(triton):
    test_paged_attention.test_strided_cache(None)


def test_lengths_and_pages_out_of_bounds_stay_inside(triton):
    """The CPU refuses these; a GPU sees them too late, and reads nothing outside the tensors."""
    k, v, table, lens = cache([9, 20], 4, 2, 16, 16, torch.float32)
    q = torch.randn(2, 1, 4, 16)
    good = ops.paged_attention(q, k, v, table, lens)
    table[1, 2], lens[1] = 2**31 - 1, 2**20
    assert torch.equal(ops.paged_attention(q, k, v, table, lens)[0], good[0])
    whole = ops.paged_attention(q, k, v, table, lens)
    lens = lens + torch.tensor([0, 2**32], device=lens.device)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens), whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes memory that is not touched")
def test_pages_past_two_to_the_31_elements(triton):
    k, v = (far_apart((3, 4, 2, 16), 2**30 + 16, torch.int8) for _ in range(2))
    table, lens = torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([11]).int()
    q, scales = torch.randn(1, 1, 4, 16), {"k_scale": 0.02, "v_scale": 0.03}
    expected = ops.paged_attention(q, k.contiguous(), v.contiguous(), table, lens, **scales)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens, **scales), expected)


def test_no_pages(triton):
    """The table has pages that the cache does not have: there is nothing to read."""
    cache = torch.zeros(0, 4, 2, 16)
    table, lens = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
    q = torch.randn(2, 1, 4, 16)
    out, lse = ops.paged_attention(q, cache, cache, table, lens, return_lse=True)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
