"""attention: every option and instruction set against float64, dropout exactly, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_kernel_near, run
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops, reference

# (B, H, Hkv, S, T, D, Dv)
SHAPES = [
    (2, 4, 2, 37, 53, 64, 64),
    (
        1,
        2,
        1,
        130,
        300,
        40,
        24,
    ),  # two blocks of queries and of keys, widths that are not multiples of a vector
    (1, 2, 2, 100, 100, 1, 7),
    (2, 3, 3, 5, 3, 33, 16),  # more queries than keys: causal rows that see nothing
    (1, 6, 2, 1, 700, 64, 48),  # decoding, two chunks
    (1, 2, 1, 2, 600, 256, 256),
    (1, 10, 1, 1, 40, 80, 80),  # more rows per key head than the decoding path accepts
    (1, 3, 1, 1, 1, 80, 80),  # a single token; up to 8 queries and keys have their own backward
    (2, 4, 2, 8, 8, 256, 24),
    (3, 2, 2, 7, 8, 40, 40),
]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window softcap": {"window": 19, "softcap": 3.0},
    "everything": {
        "causal": True, "scale": -0.3, "softcap": 9.0, "alibi": True, "bias": "full", "sinks": True,
        "dropout_p": 0.2,
    },
    "bias of keys, dropout": {"bias": "keys", "dropout_p": 0.4},
    "bias of rows, sinks, window": {"bias": "rows", "sinks": True, "window": 4, "causal": True},
}  # fmt: skip


def case(shape, options, dtype):
    """(function of leaves returning (out, lse), leaves, names of their gradients)"""
    b, h, hkv, s, t, d, dv = shape
    options = dict(options)
    leaves = [torch.randn(b, h, s, d), torch.randn(b, hkv, t, d), torch.randn(b, hkv, t, dv)]
    leaves = [x.to(dtype) for x in leaves]
    names = ["q", "k", "v"]
    if bias := options.pop("bias", None):
        size = {"full": (b, h, s, t), "keys": (h, 1, t), "rows": (b, 1, s, 1)}[bias]
        leaves.append(torch.randn(size).to(dtype))
        names.append("bias")
    if options.pop("sinks", False):
        leaves.append(torch.randn(h))
        names.append("sinks")
    slopes = torch.rand(h) if options.pop("alibi", False) else None

    def function(*leaves, **other):
        given = dict(zip(names, leaves)) | options | other
        q, k, v = (given.pop(n) for n in "qkv")
        return ops.attention(q, k, v, alibi_slopes=slopes, return_lse=True, **given)

    function.scale = options.get("scale")
    return function, leaves, ["d" + n for n in names]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(isa, dtype, shape, options):
    assert_kernel_near(*case(shape, options, dtype), what=isa)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_torch(dtype, causal):
    """No worse than SDPA in this dtype: the test above relies on the reference, this on torch."""
    q, k, v = (torch.randn(2, h, 70, 32).to(dtype) for h in (4, 2, 2))

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    wide = [t.double() for t in (q, k, v)]
    naive, truth = sdpa(q, k, v), sdpa(*wide)
    for name in ("reference", "cpu"):
        with backend.use_backend(name):
            assert_near(ops.attention(q, k, v, causal=causal), naive, truth, what=name)
    torch.testing.assert_close(ops.attention(*wide, causal=causal), truth)


@pytest.mark.slow
def test_long_sequence(dtype):
    assert_kernel_near(*case((1, 2, 1, 1280, 1280, 64, 64), {"causal": True}, dtype), what="1280")


def test_spans_and_heads_agree(isa):
    """One key head is cut into spans of keys, eight are not. The gradients are the same."""
    q, k, v = (torch.randn(1, 1, 1100, 16) for _ in range(3))

    def grads(n):
        leaves = [t.expand(n, -1, -1, -1).clone().requires_grad_() for t in (q, k, v)]
        out = ops.attention(*leaves, causal=True)
        return [g[:1] for g in torch.autograd.grad(out.square().sum(), leaves)]

    for one, many in zip(grads(1), grads(8)):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5 * one.abs().max().item())


def test_sees_nothing(isa, dtype):
    """Rows before the first key, rows masked by bias, no keys: zero, -inf, zero gradients."""
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    function = lambda q, k, v: ops.attention(q, k, v, causal=True, return_lse=True)  # noqa: E731
    out, lse, dq, dk, dv = run(function, [t.to(dtype) for t in (q, k, v)])
    assert out[:, :, :4].eq(0).all() and lse[:, :, :4].eq(-math.inf).all()
    assert dq[:, :, :4].eq(0).all() and all(t.isfinite().all() for t in (out, dq, dk, dv))
    bias = torch.zeros(6, 2)
    bias[3] = -math.inf
    function = lambda q, k, v: ops.attention(q, k, v, bias=bias, return_lse=True)  # noqa: E731
    out, lse, dq, dk, dv = run(function, [t.to(dtype) for t in (q, k, v)])
    assert out[:, :, 3].eq(0).all() and lse[:, :, 3].eq(-math.inf).all() and dq[:, :, 3].eq(0).all()
    assert all(t.isfinite().all() for t in (out, dk, dv))
    sinks = torch.tensor([0.5, -2.0])
    out, lse = ops.attention(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True)
    assert out.eq(0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, 6))


def test_empty(isa, dtype):
    for b, s, t in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 1, 0)):
        q, k, v = (torch.randn(b, 2, n, 8).to(dtype) for n in (s, t, t))
        out, lse, *grads = run(lambda *x: ops.attention(*x, return_lse=True), [q, k, v])
        assert out.shape == q.shape and out.eq(0).all() and lse.eq(-math.inf).all()
        assert all(g.eq(0).all() for g in grads)


def test_strided(isa, dtype):
    """Interleaved heads, strided rows, strided elements: the same as contiguous, both ways."""
    base = torch.randn(2, 20, 3, 4, 24).to(dtype)
    qkv = base.permute(2, 0, 3, 1, 4)  # (3, B, H, S, D) as a fused projection leaves it
    apart = torch.randn(3, 2, 4, 40, 48).to(dtype)[:, :, :, ::2, ::2]
    for q, k, v in (qkv, apart):
        plain = [t.contiguous() for t in (q, k, v)]
        function = lambda *x: ops.attention(*x, causal=True, return_lse=True)  # noqa: E731
        expected = run(function, plain)
        assert torch.equal(ops.attention(q, k, v, causal=True), expected[0])
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = ops.attention(*leaves, causal=True)
        gout = torch.randn(2, 20, 4, 24).to(dtype).transpose(1, 2)
        other = [t.detach().requires_grad_() for t in plain]
        want = torch.autograd.grad(ops.attention(*other, causal=True), other, gout.contiguous())
        got = torch.autograd.grad(out, leaves, gout)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_repeat_and_threads(isa, dtype):
    """The same bits on repetition, and on one thread as on two."""
    parts = [
        case((2, 4, 2, 70, 90, 32, 32), OPTIONS["everything"], dtype),
        case((1, 3, 1, 1, 1500, 32, 32), {}, dtype),
        case((1, 2, 1, 300, 600, 16, 16), {"causal": True}, dtype),
    ]
    threads = torch.get_num_threads()
    try:
        for function, leaves, _ in parts:
            results = []
            for n in (2, 2, 1):
                torch.set_num_threads(n)
                results.append(run(function, leaves))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0])
def test_peaked_and_offset(isa, dtype, offset):
    """One key with a score far above the rest; all scores far from zero."""
    q, k, v = (torch.randn(1, 2, 40, 16).to(dtype) for _ in range(3))
    k[:, :, 7] *= 30
    bias = torch.full((1, 1, 40, 40), offset).to(dtype)

    def function(*qkv, **other):
        return ops.attention(*qkv, bias=bias, return_lse=True, **other)

    assert_kernel_near(function, [q, k, v], ["dq", "dk", "dv"], what=isa)


def test_nan_is_not_hidden(isa, dtype):
    q, k, v = (torch.randn(1, 1, 40, 16).to(dtype) for _ in range(3))
    k[0, 0, 3, 2] = math.nan
    assert ops.attention(q, k, v).isnan().all()
    assert ops.attention(q[:, :, :1], k, v).isnan().all()


def test_bool_bias_is_a_mask():
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    mask = torch.rand(2, 1, 9, 9) < 0.7
    torch.testing.assert_close(
        ops.attention(q, k, v, bias=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


def test_philox_known_answers():
    """The published vectors of Random123's philox4x32-10."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    assert [int(w) for w in reference.philox((zero,) * 4, zero)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    assert [int(w) for w in reference.philox((ones,) * 4, torch.tensor([-1]))] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def test_dropout_draws_the_same_everywhere(isa):
    """With v the identity the output is P after dropout: every backend has the same zeros."""
    q, k = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 130, 8)
    v = torch.eye(130).expand(2, 3, 130, 130)
    dropped = []
    for name in ("cpu", "reference"):
        torch.manual_seed(11)
        with backend.use_backend(name):
            dropped.append(ops.attention(q, k, v, dropout_p=0.25).eq(0))
    assert torch.equal(*dropped)
    share = dropped[0].double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / dropped[0].numel())
    assert not torch.equal(dropped[0][0], dropped[0][1])  # another sequence has another draw
    torch.manual_seed(11)
    assert ops.attention(q, k, v, dropout_p=1.0).eq(0).all()
    assert not ops.attention(q, k, v, dropout_p=0.25).eq(0).equal(dropped[0])  # the next draw


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 2),
    hkv=st.integers(1, 3),
    groups=st.integers(1, 3),
    s=st.integers(0, 140),
    t=st.integers(0, 300),
    d=st.integers(1, 70),
    dv=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 150),
    softcap=st.sampled_from([None, 5.0]),
    bias=st.sampled_from([None, "full", "keys", "rows"]),
    sinks=st.booleans(),
    alibi=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_any_shape_agrees_with_reference(b, hkv, groups, s, t, d, dv, **options):
    function, leaves, names = case((b, hkv * groups, hkv, s, t, d, dv), options, torch.float32)
    assert_kernel_near(function, leaves, names, what="any")


def test_gradcheck_of_the_reference():
    shape = (2, 4, 2, 5, 7, 3, 4)
    for options in (OPTIONS["everything"], OPTIONS["bias of rows, sinks, window"]):
        function, leaves, _ = case(shape, options, torch.float64)

        def fixed(*x, function=function):
            torch.manual_seed(3)
            return function(*x)

        assert torch.autograd.gradcheck(fixed, [x.double().requires_grad_() for x in leaves])


def test_opcheck():
    q, k, v = (torch.randn(2, h, 6, 8, requires_grad=True) for h in (4, 2, 2))
    sinks, bias = torch.randn(4, requires_grad=True), torch.randn(1, 4, 6, 6, requires_grad=True)
    seed = torch.tensor([7])
    torch.library.opcheck(
        torch.ops.fastlm.attention.default,
        (q, k, v, sinks, torch.rand(4), bias, seed, True, 0.3, 4, 5.0, 0.2),
    )
    torch.library.opcheck(
        torch.ops.fastlm.attention.default,
        (q, k, v, None, None, None, None, False, 0.3, 0, 0.0, 0.0),
    )


def test_compiles_without_break_or_recompile():
    assert_compiles_once(
        lambda q, k, v: ops.attention(q, k, v, causal=True, window=6, softcap=5.0),
        [
            tuple(torch.randn(b, h, s, 16, requires_grad=True) for h in (4, 2, 2))
            for b, s in ((3, 8), (5, 9), (6, 17))  # B differs from Hkv: equal sizes share a symbol
        ],
    )
    drop = torch.compile(
        lambda q: ops.attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q = torch.randn(2, 2, 9, 4, requires_grad=True)
    assert torch.autograd.grad(drop(q).sum(), q)[0].isfinite().all()
    assert not torch.equal(drop(q), drop(q))


REFUSALS = [
    ({"q": (2, 4, 8)}, r"q: wanted 4 dimensions \(B, heads, length, D\), got \(2, 4, 8\)"),
    ({"k": (3, 2, 5, 8)}, r"k, v: wanted .* with B = 2 as q, got \(3, 2, 5, 8\), \(2, 2, 5, 8\)"),
    ({"v": (2, 2, 6, 8)}, r"k, v: wanted .* got \(2, 2, 5, 8\), \(2, 2, 6, 8\)"),
    ({"k": (2, 2, 5, 7)}, r"k: wanted head width D = 8 >= 1 as q, got k \(2, 2, 5, 7\)"),
    ({"q": (2, 3, 5, 8)}, "q: wanted heads a multiple of k's 2, got 3"),
    ({"window": 0}, "window: wanted at least 1 or None, got 0"),
    ({"softcap": -1.0}, "softcap: wanted above 0 or None, got -1.0"),
    ({"dropout_p": 1.5}, "dropout_p: wanted 0 to 1, got 1.5"),
    ({"sinks": torch.zeros(3)}, r"sinks: wanted \(4,\) floats on cpu, .* got torch.float32 \(3,\)"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes: wanted constants"),
    ({"bias": torch.zeros(5, 4)}, r"bias: wanted to broadcast to \(2, 4, 5, 5\) .* got \(5, 4\)"),
    ({"bias": torch.zeros(5, 5, dtype=torch.int64)}, "bias: wanted float or bool, got torch.int64"),
]


@pytest.mark.parametrize("wrong, message", REFUSALS, ids=[m[:24] for _, m in REFUSALS])
def test_refusals(wrong, message):
    given = {"q": (2, 4, 5, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)} | wrong
    given = {n: torch.randn(x) if isinstance(x, tuple) else x for n, x in given.items()}
    with pytest.raises(InputError, match=message):
        ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_refuses_mixed_and_integer_dtypes():
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(InputError, match=r"k: wanted torch\.float32 as q, got torch.bfloat16"):
        ops.attention(x, x.bfloat16(), x)
    with pytest.raises(InputError, match=r"q: wanted a float dtype, got torch\.int64"):
        ops.attention(x.long(), x.long(), x.long())


def test_lse_is_float32(dtype):
    x = torch.randn(1, 2, 3, 4).to(dtype)
    _, lse = ops.attention(x, x, x, return_lse=True)
    assert lse.dtype == torch.float32
    truth = torch.logsumexp((x.double() @ x.double().mT) / 2, -1)
    assert (lse - truth).abs().max() <= 8 * ULP[torch.float32] * truth.abs().max()
