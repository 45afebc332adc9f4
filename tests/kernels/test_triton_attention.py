"""attention's Triton kernels against float64, interpreted if there is no GPU."""

import math

import pytest
import test_attention
import torch
from attention_cases import assert_kernel_near, far_apart, run
from test_attention import OPTIONS, case

from fastlm import backend, ops
from fastlm.kernels import attention_forward as kernel

# (B, H, Hkv, S, T, D, Dv): one tile and several of rows and of keys, widths that are not a power of
# two, few rows (packed heads), rows that see nothing, one key
SHAPES = [
    (1, 2, 1, 37, 70, 40, 24),
    (2, 4, 2, 9, 53, 64, 64),
    (1, 3, 3, 5, 3, 33, 16),
    (1, 6, 2, 1, 40, 24, 48),
    (1, 2, 2, 1, 1, 80, 80),
]
SOME = ("plain", "everything")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(triton, shape, options):
    assert_kernel_near(*case(shape, options, torch.float32), what="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_halves_match_float64(triton, dtype, shape):
    assert_kernel_near(*case(shape, OPTIONS["everything"], dtype), what="triton")


def test_tiles_beyond_the_window(triton):
    """Whole tiles before the window and after the diagonal, and several unmasked between them."""
    options = {"window": 150, "causal": True, "dropout_p": 0.2}
    for s, t in ((100, 260), (260, 100)):
        assert_kernel_near(*case((1, 1, 1, s, t, 16, 16), options, torch.bfloat16), what="window")


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=SOME)
def test_splits_match_float64(triton, options, monkeypatch):
    """Few rows and many keys, shared by several programs."""
    used = []
    split = kernel._splits
    monkeypatch.setattr(kernel, "_splits", lambda *a: used.append(split(*a)) or used[-1])
    assert_kernel_near(*case((1, 4, 2, 2, 700, 16, 24), options, torch.float32), what="splits")
    assert max(used) > 1


def test_dropout_draws_the_same(triton):
    """The same draw for every tile width, which uses four words of a counter, two, or one."""
    q, k = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 140, 8)
    v = torch.eye(140).expand(2, 2, 140, 140)
    for n in (16, 32, 64, 128):
        tiles = kernel.Tiles("of the test", {(4, 256): {80: kernel._tiles(16, n, 4, 1)}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "_MANY", tiles)
            patch.setattr(kernel, "_FEW", tiles)
            dropped = []
            for name in ("triton", "reference"):
                torch.manual_seed(11)
                with backend.use_backend(name):
                    dropped.append(ops.attention(q, k, v, dropout_p=0.25).eq(0))
            assert torch.equal(*dropped), n
    assert ops.attention(q, k, v, dropout_p=1.0).eq(0).all()


def test_a_window_of_every_key(triton):
    """Such a window, added to a row index, exceeds 2^31."""
    leaves = [torch.randn(1, 2, n, 16) for n in (20, 70, 70)]
    plain, wide = (
        run(lambda *x, w=w: ops.attention(*x, causal=True, window=w, return_lse=True), leaves)
        for w in (None, 2**31 - 1)
    )
    for a, b in zip(plain, wide):
        torch.testing.assert_close(a, b)


def test_sees_nothing(triton):
    test_attention.test_sees_nothing(None, torch.float32)


def test_empty(triton):
    test_attention.test_empty(None, torch.float32)


def test_strided(triton):
    test_attention.test_strided(None, torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes memory that is not touched")
def test_rows_past_two_to_the_31_elements(triton):
    """The third row of q, k and v is past 2^31 elements. The bits equal those of packed rows."""
    bias = torch.randn(3, 3)
    qkv = [far_apart((3, 1, 1, 16), 2**30 + 8, torch.float16) for _ in range(3)]

    def function(*qkv):
        return ops.attention(*(t.permute(1, 2, 0, 3) for t in qkv), bias=bias, return_lse=True)

    leaves = [t.requires_grad_() for t in qkv]
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    packed = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in qkv]
    other, other_lse = function(*packed)
    assert torch.equal(out, other) and torch.equal(lse, other_lse)
    for a, b in zip(grads, torch.autograd.grad(other.sum(), packed)):
        assert torch.equal(a, b)


def test_memory_order(triton):
    """out and the gradients have the CPU's order, which the next projection reads in place."""
    q, k, v = torch.randn(3, 2, 5, 4, 16).transpose(2, 3).requires_grad_().unbind(0)
    out = ops.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert all(g.stride() == q.stride() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("offset", [0.0, -60.0])
def test_peaked_and_offset(triton, offset):
    test_attention.test_peaked_and_offset("triton", torch.bfloat16, offset)


def test_nan_is_not_hidden(triton):
    test_attention.test_nan_is_not_hidden(None, torch.float32)


def test_infinite_sinks(triton):
    q, k, v = (torch.randn(1, 2, 3, 16) for _ in range(3))
    sinks = torch.tensor([-math.inf, 3.0])
    mine = ops.attention(q, k, v, sinks=sinks)
    with backend.use_backend("reference"):
        torch.testing.assert_close(mine, ops.attention(q, k, v, sinks=sinks))


def test_repeats_bit_for_bit(triton):
    function, leaves, _ = case((1, 4, 2, 20, 70, 16, 16), OPTIONS["everything"], torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(run(function, leaves), run(function, leaves)))


@pytest.mark.parametrize("size", [(2, 2, 1, 1), (1, 2, 9, 1), (2, 1, 1, 40), (1, 1, 9, 40)])
def test_bias_gradient_of_every_broadcast(triton, size):
    _, leaves, names = case((2, 2, 1, 9, 40, 16, 16), {"causal": True}, torch.float32)

    def biased(q, k, v, bias, **other):
        return ops.attention(q, k, v, bias=bias, return_lse=True, causal=True, window=30, **other)

    assert_kernel_near(biased, [*leaves, torch.randn(size)], [*names, "dbias"], what="bias")
