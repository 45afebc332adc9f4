"""rms_norm: forward and backward on every instruction set against float64, compile, refusals."""

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near

from fastlm import InputError, backend, ops


def naive(x, weight, eps, offset, residual=None):
    h = x if residual is None else x + residual
    factor = None if weight is None else (offset + weight).to(h.dtype)
    return F.rms_norm(h, (h.shape[-1],), factor, eps), h


def run(function, x, weight, residual, dy, dh, **options):
    """Output(s) and gradients of one forward and backward."""
    leaves = [
        t.detach().clone().requires_grad_() if t is not None else None
        for t in (x, weight, residual)
    ]
    y, h = function(leaves[0], leaves[1], residual=leaves[2], **options)
    grads = torch.autograd.grad(
        [y] if residual is None else [y, h],
        [t for t in leaves if t is not None],
        [dy] if residual is None else [dy, dh],
    )
    return [y.detach(), *([] if residual is None else [h.detach()]), *grads]


def fused(x, weight, residual=None, **options):
    out = ops.rms_norm(x, weight, residual=residual, **options)
    return out if residual is not None else (out, x)


@pytest.mark.parametrize(
    "shape", [(4, 512), (252, 507), (1, 123), (3, 5, 64), (2, 1), (130, 17)], ids=str
)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_matches_float64(isa, dtype, shape, with_residual, offset):
    check(dtype, shape, with_residual, offset)


def check(dtype, shape, with_residual, offset, device="cpu", with_weight=True):
    x, dy, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    residual = torch.randn(shape, device=device).to(dtype) if with_residual else None
    weight = torch.randn(shape[-1], device=device).to(dtype) if with_weight else None
    wide_weight = None if weight is None else weight.double()
    options = {"eps": 1e-6, "offset": offset}
    actual = run(fused, x, weight, residual, dy, dh, **options)
    plain = run(naive, x, weight, residual, dy, dh, **options)
    # the sum x + residual is rounded by definition, so the truth starts from the rounded sum
    h64 = (x if residual is None else x + residual).double()
    truth = run(naive, h64, wide_weight, None, dy.double(), None, **options)
    if residual is not None:
        y, dx, *dw = truth
        truth = [y, h64, dx + dh.double(), *dw, dx + dh.double()]
    names = ["y", *["h"] * with_residual, "dx", *["dweight"] * with_weight, "dresidual"]
    for name, a, p, t in zip(names, actual, plain, truth):
        # the kernel does not round where torch does between ops: factor 2 (backward 3) needs no
        # slack
        assert_near(a, p, t, factor=2 if name in "yh" else 3, what=name)


def test_rows_apart_and_transposed(isa, dtype):
    base = torch.randn(40, 96).to(dtype)
    weight = torch.randn(32)
    for x in (base[:, 10:42], base[::3, :32], base[:32].t()[:40]):
        w = weight[: x.shape[-1]]
        assert torch.equal(ops.rms_norm(x, w), ops.rms_norm(x.contiguous(), w))


def test_leading_dimensions(isa, dtype):
    """(..., H) with any strides equals the rows of its copy, also with a strided dy."""
    weight = torch.randn(33, requires_grad=True)
    x = torch.randn(4, 3, 2, 33).to(dtype).transpose(0, 2).requires_grad_()
    dy = torch.randn(4, 3, 2, 33).to(dtype).transpose(0, 2)
    flat = x.detach().reshape(-1, 33).requires_grad_()
    y, h = ops.rms_norm(x, weight, residual=x)
    y_flat, h_flat = ops.rms_norm(flat, weight, residual=flat)
    assert torch.equal(y.reshape(-1, 33), y_flat) and torch.equal(h.reshape(-1, 33), h_flat)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    dx_flat, dw_flat = torch.autograd.grad(y_flat, (flat, weight), dy.reshape(-1, 33))
    assert torch.equal(dx.reshape(-1, 33), dx_flat) and torch.equal(dw, dw_flat)
    row = x.detach()[1, 2, 3]
    assert torch.equal(ops.rms_norm(row, weight), ops.rms_norm(row[None], weight)[0])


def test_empty_and_repeat(isa, dtype):
    weight = torch.randn(8)
    assert ops.rms_norm(torch.empty(0, 8, dtype=dtype), weight).shape == (0, 8)
    x = torch.randn(300, 257).to(dtype)
    w = torch.randn(257)
    dy = torch.randn(300, 257).to(dtype)
    first, second = (run(fused, x, w, None, dy, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_same_bits_on_one_and_two_threads(isa):
    x, w, dy = torch.randn(300, 512), torch.randn(512), torch.randn(300, 512)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(fused, x, w, None, dy, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_scales(isa, dtype, scale):
    x = (torch.randn(16, 200) * (scale if dtype != torch.float16 else scale**0.5)).to(dtype)
    weight = torch.randn(200).to(dtype)
    assert_near(
        ops.rms_norm(x, weight),
        naive(x, weight, 1e-6, 0.0)[0],
        naive(x.double(), weight.double(), 1e-6, 0.0)[0],
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 300),
    with_residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0, -0.5]),
)
def test_any_shape_agrees_with_reference(rows, width, with_residual, offset):
    x, dy, dh = torch.randn(3, rows, width).unbind(0)
    weight = torch.randn(width)
    residual = torch.randn(rows, width) if with_residual else None
    mine = run(fused, x, weight, residual, dy, dh, offset=offset)
    with backend.use_backend("reference"):
        theirs = run(fused, x, weight, residual, dy, dh, offset=offset)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-4 * max(1, rows) ** 0.5
        )  # sums over rows grow with sqrt(rows)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32), (32,)])
def test_opcheck(with_residual, shape):
    x = torch.randn(shape, requires_grad=True)
    residual = torch.randn(shape, requires_grad=True) if with_residual else None
    torch.library.opcheck(
        torch.ops.fastlm.rms_norm.default,
        (x, residual, torch.randn(32, requires_grad=True), 1e-6, 0.0),
    )


def test_gradcheck_of_the_reference():
    x, r, w = (
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(7, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda x, r, w: ops.rms_norm(x, w, residual=r, offset=1.0), (x, r, w)
    )
    assert torch.autograd.gradcheck(lambda x, r: ops.rms_norm(x, residual=r), (x, r))


def test_compiles_without_break_or_recompile():
    weight = torch.randn(64)
    assert_compiles_once(
        lambda x, w: ops.rms_norm(x, w, residual=x * 2)[0],
        [(torch.randn(n, 64, requires_grad=True), weight.requires_grad_()) for n in (4, 9, 17)],
    )


@pytest.mark.parametrize("shape", [(4, 512), (70, 123), (2, 1)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_without_a_weight(isa, dtype, shape, with_residual):
    check(dtype, shape, with_residual, 0.0, with_weight=False)
    x, ones = torch.randn(shape).to(dtype), torch.ones(shape[-1])
    assert torch.equal(ops.rms_norm(x), ops.rms_norm(x, ones))
    torch.library.opcheck(torch.ops.fastlm.rms_norm.default, (x, None, None, 1e-6, 0.0))


def test_refusals():
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match=r"weight: wanted shape \(H,\) .*\(2, 8\), got \(7,\)"):
        ops.rms_norm(x, torch.randn(7))
    with pytest.raises(
        InputError,
        match=r"residual: wanted torch.float32 of shape \(2, 8\) as x on cpu, got torch.bfloat16",
    ):
        ops.rms_norm(x, torch.randn(8), residual=x.bfloat16())
    with pytest.raises(InputError, match=r"x: wanted shape \(..., H\), H >= 1, got \(3, 0\)"):
        ops.rms_norm(torch.empty(3, 0), torch.empty(0))
    with pytest.raises(InputError, match=r"weight: wanted floats on cpu as x, got torch\.complex"):
        ops.rms_norm(x, torch.ones(8, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"x: wanted a float dtype, got torch\.int64"):
        ops.rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.randn(8))
    with (
        backend.use_backend("cpu"),
        pytest.raises(InputError, match=r"cpu serves float32, bfloat16, float16, not float64"),
    ):
        ops.rms_norm(x.double(), torch.randn(8).double())
