"""varlen_attention: packed sequences give each sequence's own results; no leaks; refusals."""

import pytest
import torch
from attention_cases import assert_kernel_near, run
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import InputError, backend, ops

LENGTHS = [
    ([5, 0, 130, 1, 37], [9, 3, 300, 1, 0]),  # empty on either side, several blocks
    ([33, 64], [33, 64]),
    ([7], [530]),
]
OPTIONS = {
    "causal": {"causal": True},
    "everything": {
        "causal": True, "window": 50, "softcap": 4.0, "alibi": True, "bias": True, "sinks": True,
        "dropout_p": 0.3,
    },
}  # fmt: skip


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def case(lengths, options, dtype, heads=(4, 2), widths=(24, 40)):
    (lq, lk), (h, hkv), (d, dv) = lengths, heads, widths
    options = dict(options)
    leaves = [
        torch.randn(sum(lq), h, d),
        torch.randn(sum(lk), hkv, d),
        torch.randn(sum(lk), hkv, dv),
    ]
    leaves = [x.to(dtype) for x in leaves]
    names = ["q", "k", "v"]
    if options.pop("bias", False):
        leaves.append(torch.randn(len(lq), 1, max(lq), max(lk)).to(dtype))
        names.append("bias")
    if options.pop("sinks", False):
        leaves.append(torch.randn(h))
        names.append("sinks")
    slopes = torch.rand(h) if options.pop("alibi", False) else None

    def function(*leaves, **other):
        given = dict(zip(names, leaves)) | options | other
        q, k, v = (given.pop(n) for n in "qkv")
        return ops.varlen_attention(
            q,
            k,
            v,
            offsets(lq),
            offsets(lk),
            alibi_slopes=slopes,
            return_lse=True,
            **given,
        )

    return function, leaves, ["d" + n for n in names]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_float64(isa, dtype, lengths, options):
    assert_kernel_near(*case(lengths, options, dtype), what=isa)


def test_is_attention_of_each_sequence(isa, dtype):
    """Equal, bit for bit, to the dense op on each sequence alone."""
    lengths = [40, 3, 97]
    q, k, v = (torch.randn(140, h, 32).to(dtype) for h in (4, 2, 2))
    out, lse = ops.varlen_attention(q, k, v, offsets(lengths), causal=True, return_lse=True)
    for start, n in zip(offsets(lengths).tolist(), lengths):
        part = slice(start, start + n)
        alone, alone_lse = ops.attention(
            *(t[part].transpose(0, 1)[None] for t in (q, k, v)), causal=True, return_lse=True
        )
        if n > 4:  # short ones use the decoding path when dense, which rounds differently
            assert torch.equal(out[part], alone[0].transpose(0, 1))
            assert torch.equal(lse[:, part], alone_lse[0])
    k2 = k.clone()
    k2[40:43] = float("nan")  # NaN in the middle sequence must not spread
    again = ops.varlen_attention(q, k2, v, offsets(lengths), causal=True)
    assert torch.equal(again[:40], out[:40]) and torch.equal(again[43:], out[43:])


def test_strided_repeat_and_threads(isa, dtype):
    qkv = torch.randn(60, 3, 4, 16).to(dtype)
    q, k, v = qkv.unbind(1)  # strided rows from a fused projection
    lengths = ([20, 40], [20, 40])
    function = lambda *x: ops.varlen_attention(  # noqa: E731
        *x, offsets(lengths[0]), causal=True, return_lse=True
    )
    expected = run(function, [t.contiguous() for t in (q, k, v)])
    assert torch.equal(function(q, k, v)[0], expected[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(run(function, [q, k, v]), expected))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 140)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (8, 8)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 90),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_any_lengths_agree_with_reference(lengths, heads, **options):
    lq, lk = (list(x) for x in zip(*lengths))
    if options["bias"] and (max(lq) == 0 or max(lk) == 0):
        options["bias"] = False
    function, leaves, names = case((lq, lk), options, torch.float32, heads, (20, 9))
    assert_kernel_near(function, leaves, names, what="any")


def test_opcheck():
    q, k, v = (torch.randn(9, h, 8, requires_grad=True) for h in (4, 2, 2))
    cu = offsets([4, 5])
    bias, sinks = torch.randn(1, 1, 5, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastlm.varlen_attention.default,
        (
            q,
            k,
            v,
            cu,
            cu,
            sinks,
            torch.rand(4),
            bias,
            torch.tensor([3]),
            5,
            5,
            True,
            0.3,
            4,
            5.0,
            0.2,
        ),
    )


def test_gradcheck_of_the_reference():
    function, leaves, _ = case(
        ([3, 0, 4], [2, 1, 5]), OPTIONS["everything"], torch.float64, widths=(3, 2)
    )

    def fixed(*x):
        torch.manual_seed(3)
        return function(*x)

    assert torch.autograd.gradcheck(fixed, [x.double().requires_grad_() for x in leaves])


def test_compiles_without_break_or_recompile():
    assert_compiles_once(
        lambda q, k, v, cu: ops.varlen_attention(q, k, v, cu, causal=True),
        [
            (*(torch.randn(sum(n), h, 16, requires_grad=True) for h in (4, 2, 2)), offsets(n))
            for n in ([4, 5], [7, 1, 3], [2, 2, 2, 9])
        ],
    )


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    "bad",
    [[0, 5, 3, 9], [0, 4, 8], [1, 4, 9], [0, -1, 9], [0, 4, 12], [0, 4, 2**32 + 9], [-(2**32), 9]],
    ids=str,
)
def test_refuses_wrong_offsets(name, bad):
    q = torch.randn(9, 2, 8)
    wanted = "cu_seqlens_q: wanted offsets that rise from 0 to 9, got"
    with backend.use_backend(name), pytest.raises(InputError, match=wanted):
        ops.varlen_attention(q, q, q, torch.tensor(bad))


def test_refusals():
    q = torch.randn(9, 2, 8)
    cu = offsets([4, 5])
    for arguments, message in (
        ((q[None], q, q, cu), r"q: wanted 3 dimensions \(total, heads, D\), got \(1, 9, 2, 8\)"),
        ((q, q, q[:8], cu), r"v: wanted \(total_k, Hkv, Dv\) as k \(9, 2, 8\), got \(8, 2, 8\)"),
        (
            (q, q, q, cu.float()),
            r"cu_seqlens_q: wanted \(B \+ 1,\) int32 on cpu, got torch.float32",
        ),
        (
            (q, q, q, cu, cu[:2]),
            r"cu_seqlens_k: wanted \(B \+ 1,\) as cu_seqlens_q \(3,\), got \(2,\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ops.varlen_attention(*arguments)
    with pytest.raises(
        InputError, match=r"bias: wanted at least \(5, 5\) for sequence 1, got \(4, 5\)"
    ):
        ops.varlen_attention(q, q, q, cu, bias=torch.zeros(4, 5))
