"""varlen_attention's Triton kernels against float64, interpreted if there is no GPU."""

import pytest
import torch
from attention_cases import assert_kernel_near, run
from test_varlen_attention import OPTIONS, case, offsets

from fastlm import ops

LENGTHS = [
    ([5, 0, 70, 1, 37], [9, 3, 40, 1, 0]),  # empty on either side, several tiles
    ([0, 33, 0], [0, 33, 0]),
    ([1], [70]),
    ([], []),
]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
def test_matches_float64(triton, lengths, options):
    assert_kernel_near(*case(lengths, options, torch.float32, widths=(16, 24)), what="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_match_float64(triton, dtype):
    assert_kernel_near(*case(LENGTHS[0], OPTIONS["everything"], dtype), what="triton")


def test_no_sequences(triton):
    q = torch.zeros(0, 2, 16)
    assert ops.varlen_attention(q, q, q, offsets([])).shape == q.shape


@pytest.mark.parametrize("longest", [1, 5, 40, 1000])
def test_any_hint_gives_the_same(triton, longest):
    """max_seqlen_q selects tiles and packs heads. A wrong value does not lose rows."""
    lengths = [20, 3, 40]
    q, k, v = (torch.randn(63, h, 16) for h in (4, 2, 2))
    cu = offsets(lengths)
    expected = ops.varlen_attention(q, k, v, cu, causal=True)
    mine = ops.varlen_attention(q, k, v, cu, causal=True, max_seqlen_q=longest)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("wrong", [[0, -1000, 9], [5, 7], [0, 12, 3], [0, 2**32 + 4]], ids=str)
def test_wrong_offsets_stay_inside(triton, wrong):
    """The CPU refuses these. A GPU sees them too late, and writes no row outside all sequences.
    There is one element per row, so that blocks of rows outside the tensors end inside the
    guards."""
    q, k, v = (torch.randn(9, 1, 1) for _ in range(3))
    cu = torch.tensor(wrong)
    results = run(lambda *x: ops.varlen_attention(*x, cu, return_lse=True), [q, k, v])
    if wrong == [5, 7]:
        for rows in (results[0], results[1][0], *results[2:]):
            assert rows[:5].isnan().all() and rows[7:].isnan().all()
            assert rows[5:7].isfinite().all()


def test_no_leak(triton):
    lengths = [20, 3, 40]
    q, k, v = (torch.randn(63, h, 16) for h in (4, 2, 2))
    cu = offsets(lengths, torch.int64)
    out = ops.varlen_attention(q, k, v, cu, causal=True)
    k[20:23], v[20:23] = float("nan"), float("nan")
    again = ops.varlen_attention(q, k, v, cu, causal=True)
    assert torch.equal(again[:20], out[:20]) and torch.equal(again[23:], out[23:])
    assert again[20:23].isnan().all()


def test_strided_and_repeated(triton):
    q, k, v = torch.randn(60, 3, 4, 16).unbind(1)  # strided rows from a fused projection

    def function(*x):
        return ops.varlen_attention(*x, offsets([20, 40]), causal=True, return_lse=True)

    expected = run(function, [t.contiguous() for t in (q, k, v)])
    assert torch.equal(function(q, k, v)[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(run(function, [q, k, v]), expected))
