"""Tests of varlen_attention beyond its table of cases (cases/varlen_attention.py)."""

import pytest
import torch
from cases.attention import assert_reference
from cases.base import run
from cases.varlen_attention import offsets
from contract import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, backend, ops


def test_the_reference_is_the_formula(op):
    assert_reference(op)


@on("cpu")
def test_is_attention_of_each_sequence(kernel, dtype):
    """Results are equal bit by bit where the dense op does not decode."""
    lengths = [40, 9, 97]
    q, k, v = (torch.randn(146, h, 32).to(dtype) for h in (4, 2, 2))
    out, lse = ops.varlen_attention(q, k, v, offsets(lengths), causal=True, return_lse=True)
    for start, n in zip(offsets(lengths).tolist(), lengths):
        part = slice(start, start + n)
        expected, expected_lse = ops.attention(
            *(t[part].transpose(0, 1)[None] for t in (q, k, v)), causal=True, return_lse=True
        )
        assert torch.equal(out[part], expected[0].transpose(0, 1))
        assert torch.equal(lse[:, part], expected_lse[0])


def test_nan_stays_in_its_sequence(kernel, dtype):
    lengths = [20, 3, 40]
    q, k, v = (torch.randn(63, h, 16).to(kernel.device, dtype) for h in (4, 2, 2))
    cu = offsets(lengths, torch.int64).to(kernel.device)
    out = ops.varlen_attention(q, k, v, cu, causal=True)
    k[20:23], v[20:23] = float("nan"), float("nan")
    actual = ops.varlen_attention(q, k, v, cu, causal=True)
    assert torch.equal(actual[:20], out[:20]) and torch.equal(actual[23:], out[23:])
    assert actual[20:23].isnan().all()


@on("triton")
@pytest.mark.parametrize("longest", [1, 5, 40, 1000])
def test_any_hint_gives_the_same(kernel, longest):
    """max_seqlen_q selects tiles and packs heads. A wrong value does not lose rows."""
    q, k, v = (torch.randn(63, h, 16).to(kernel.device) for h in (4, 2, 2))
    cu = offsets([20, 3, 40]).to(kernel.device)
    expected = ops.varlen_attention(q, k, v, cu, causal=True)
    actual = ops.varlen_attention(q, k, v, cu, causal=True, max_seqlen_q=longest)
    torch.testing.assert_close(actual, expected)


@on("triton")
@pytest.mark.parametrize("wrong", [[0, -1000, 9], [5, 7], [0, 12, 3], [0, 2**32 + 4]], ids=str)
def test_wrong_offsets_stay_inside(kernel, wrong):
    """The CPU refuses these. A GPU sees them too late, and writes no row outside all sequences.
    There is one element per row, so that blocks of rows outside the tensors end inside the
    guards.
    """
    q, k, v = (torch.randn(9, 1, 1).to(kernel.device) for _ in range(3))
    cu = torch.tensor(wrong).to(kernel.device)
    results, _ = run(lambda *x: ops.varlen_attention(*x, cu, return_lse=True), [q, k, v])
    if wrong == [5, 7]:
        for rows in (results[0], results[1][0], *results[2:]):
            assert rows[:5].isnan().all() and rows[7:].isnan().all()
            assert rows[5:7].isfinite().all()


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    "bad",
    [[0, 5, 3, 9], [0, 4, 8], [1, 4, 9], [0, -1, 9], [0, 4, 12], [0, 4, 2**32 + 9], [-(2**32), 9]],
    ids=str,
)
def test_refuses_wrong_offsets(name, bad):
    q = torch.randn(9, 2, 8)
    expected = "cu_seqlens_q: expected offsets that rise from 0 to 9, got"
    with backend.use_backend(name), pytest.raises(InputError, match=expected):
        ops.varlen_attention(q, q, q, torch.tensor(bad))


def test_refusals():
    q = torch.randn(9, 2, 8)
    cu = offsets([4, 5])
    for arguments, message in (
        ((q[None], q, q, cu), r"q: expected 3 dimensions \(total, heads, D\), got \(1, 9, 2, 8\)"),
        ((q, q, q[:8], cu), r"v: expected \(total_k, Hkv, Dv\) as k \(9, 2, 8\), got \(8, 2, 8\)"),
        (
            (q, q, q, cu.float()),
            r"cu_seqlens_q: expected \(B \+ 1,\) int32 on cpu, got torch.float32",
        ),
        (
            (q, q, q, cu, cu[:2]),
            r"cu_seqlens_k: expected \(B \+ 1,\) as cu_seqlens_q \(3,\), got \(2,\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ops.varlen_attention(*arguments)
    with pytest.raises(
        InputError, match=r"bias: expected at least \(5, 5\) for sequence 1, got \(4, 5\)"
    ):
        ops.varlen_attention(q, q, q, cu, bias=torch.zeros(4, 5))
