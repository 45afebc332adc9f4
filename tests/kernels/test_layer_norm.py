"""layer_norm: forward and backward on every instruction set and on Triton against float64, compile,
refusals.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near

from fastlm import InputError, backend, ops

PARAMETERS = {"both": (True, True), "weight": (True, False), "bias": (False, True), "none": (0, 0)}
given_parameters = pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)


@pytest.fixture(params=["whole rows", "wide rows"])
def walk(request, monkeypatch, triton):
    """Small rows also use the path for wide ones, in blocks that do not divide them."""
    if request.param == "wide rows":
        ops.layer_norm(torch.ones(1, 1, device=triton))  # imports it
        module = sys.modules["fastlm.kernels.layer_norm"]
        monkeypatch.setattr(module, "_WHOLE", 0)
        monkeypatch.setattr(module, "_WIDE", module.Config({"BLOCK": 128}))
        monkeypatch.setattr(module, "_COLUMNS", module.Config({"BLOCK": 128}))
    return triton


def naive(x, weight, bias, residual, eps=1e-5):
    h = x if residual is None else x + residual
    weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, h)


def fused(x, weight, bias, residual, eps=1e-5):
    return ops.layer_norm(x, weight, bias, eps, residual=residual)


def run(function, x, weight, bias, residual, dy, dh, eps=1e-5):
    """name -> outputs and gradients of one forward and backward."""
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    leaves = {k: t.detach().clone().requires_grad_() for k, t in leaves.items() if t is not None}
    outputs = function(*[leaves.get(k) for k in ("x", "weight", "bias", "residual")], eps)
    outputs = dict(zip("yh", [outputs] if residual is None else outputs))
    upstream = [dy, dh][: len(outputs)]
    grads = torch.autograd.grad([*outputs.values()], [*leaves.values()], upstream)
    return outputs | {f"d{k}": g for k, g in zip(leaves, grads)}


def tensors(shape, dtype, parameters=(True, True), residual=False, device="cpu"):
    """x, weight, bias, residual, dy, dh"""
    x, r, dy, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    weight, bias = (
        torch.randn(shape[-1], device=device).to(dtype) if p else None for p in parameters
    )
    return x, weight, bias, r if residual else None, dy, dh


def check(x, weight, bias, residual, dy, dh, eps=1e-5):
    mine = run(fused, x, weight, bias, residual, dy, dh, eps)
    plain = run(naive, x, weight, bias, residual, dy, dh, eps)
    # the sum x + residual is rounded by definition, so the truth starts from the rounded sum
    h = (x if residual is None else x + residual).double()
    wide = [None if p is None else p.double() for p in (weight, bias)]
    truth = run(naive, h, *wide, None, dy.double(), None, eps)
    if residual is not None:
        truth["h"], truth["dx"] = h, truth["dx"] + dh.double()
        truth["dresidual"] = truth["dx"]
    assert mine.keys() == plain.keys() == truth.keys()
    # dx may cancel (entirely if H = 1), the others are sums over rows: compare with their terms
    z = h - h.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    z = z * rstd
    g = dy.double() * (1 if weight is None else weight.double())
    sums = {"dweight": dy.double() * z, "dbias": dy.double()}
    terms = {k: t.square().reshape(-1, h.shape[-1]).sum(0).sqrt() for k, t in sums.items()}
    terms |= dict.fromkeys(("dx", "dresidual"), g * rstd)
    for name, t in truth.items():
        p, a = plain[name], mine[name]
        # float32 sums of H / VL additions per lane
        floor = max(torch.finfo(a.dtype).eps, 2**-23 * h.shape[-1] ** 0.5 / 16)
        if name in terms and a.numel():
            ratio = (terms[name].abs().max() / t.abs().max().clamp_min(1e-300)).item()
            # a random walk of 64 additions to a block's sum, as large as the root sum of the terms
            floor += (4 if name in ("dx", "dresidual") else 8) * 2**-23 * ratio
        # the kernel does not round where torch does between ops: no slack but the factor
        assert_near(a, p.to(a.dtype), t, factor=2 if name in "yh" else 3, floor=floor, what=name)


SHAPES = pytest.mark.parametrize(
    "shape", [(4, 512), (252, 507), (1, 123), (3, 5, 64), (2, 1), (130, 17)], ids=str
)


@SHAPES
@pytest.mark.parametrize("residual", [False, True])
@given_parameters
def test_matches_float64(isa, dtype, shape, residual, parameters):
    check(*tensors(shape, dtype, parameters, residual))


# several rows per program and a ragged tile of them, one element, more rows than programs
@pytest.mark.parametrize(
    "shape", [(4, 512), (13, 107), (3, 5, 64), (2, 1), (70, 17), (18, 1100)], ids=str
)
@pytest.mark.parametrize("residual", [False, True])
@given_parameters
def test_triton_matches_float64(walk, dtype, shape, residual, parameters):
    check(*tensors(shape, dtype, parameters, residual, walk))


def test_triton_wide_rows_by_their_own_blocks(triton):
    check(*tensors((3, 8200), torch.bfloat16, residual=True, device=triton))
    check(*tensors((2, 8192), torch.float32, device=triton))


def check_offset(dtype, device="cpu"):
    """A mean of many standard deviations: x - mean is exact to float32, the variance is kept."""
    x, weight, bias, _, dy, dh = tensors((5, 1000), dtype, device=device)
    x = x + {torch.float32: 1e4, torch.bfloat16: 100, torch.float16: 1000}[dtype]
    check(x, weight, bias, None, dy, dh)
    truth = naive(x.double(), weight.double(), bias.double(), None)
    bound = {torch.float32: 2**-20}.get(dtype, torch.finfo(dtype).eps)  # 1e-6: sums of 1,000 terms
    assert ((ops.layer_norm(x, weight, bias) - truth).abs() <= bound * truth.abs().clamp(1)).all()


def test_a_large_mean_keeps_the_variance(isa, dtype):
    check_offset(dtype)


def test_triton_a_large_mean_keeps_the_variance(walk, dtype):
    check_offset(dtype, walk)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(isa, dtype, weight_dtype, bias_dtype):
    x, weight, bias, _, dy, dh = tensors((5, 96), dtype)
    weight, bias = weight.to(weight_dtype), bias.to(bias_dtype)
    narrow = run(fused, x, weight, bias, None, dy, dh)
    wide = run(fused, x, weight.float(), bias.float(), None, dy, dh)
    assert all(torch.equal(narrow[k], wide[k]) for k in ("y", "dx"))
    for name, like in (("dweight", weight), ("dbias", bias)):
        assert narrow[name].dtype == like.dtype
        assert torch.equal(narrow[name], wide[name].to(like.dtype))


def rows_apart_and_transposed(dtype, device="cpu"):
    base = torch.randn(40, 96, device=device).to(dtype)
    for x in (base[:, 10:42], base[::3, :32], base[:32].t()[:40], base[:1, :32].expand(5, 32)):
        weight, bias = torch.randn(x.shape[-1], 2, device=device).unbind(1)
        mine = run(fused, x, weight, bias, x, x, x)
        theirs = run(fused, *(t.contiguous() for t in (x, weight, bias, x, x, x)))
        for name, t in mine.items():
            assert torch.equal(t, theirs[name]) and t.is_contiguous(), name


def test_rows_apart_and_transposed(isa, dtype):
    rows_apart_and_transposed(dtype)


def test_triton_rows_apart_and_transposed(walk, dtype):
    rows_apart_and_transposed(dtype, walk)


def test_leading_dimensions(isa, dtype):
    """(..., H) with any strides equals the rows of its copy, also with a strided dy."""
    x, dy = torch.randn(2, 4, 3, 2, 33).to(dtype).transpose(1, 3)
    weight, bias = torch.randn(2, 33)
    mine = run(fused, x, weight, bias, x, dy, dy)
    flat = run(fused, x.reshape(-1, 33), weight, bias, x.reshape(-1, 33), *2 * [dy.reshape(-1, 33)])
    for name, t in mine.items():
        assert torch.equal(t.reshape(flat[name].shape), flat[name]), name
    row = x[1, 2, 3]
    assert torch.equal(ops.layer_norm(row, weight), ops.layer_norm(row[None], weight)[0])


def no_rows_and_repeat(dtype, device="cpu"):
    none = run(fused, *tensors((0, 8), dtype, device=device))
    assert none["y"].shape == none["dx"].shape == (0, 8)
    assert (none["dweight"] == 0).all() and (none["dbias"] == 0).all()
    given = tensors((300, 257) if device == "cpu" else (9, 257), dtype, device=device)
    first, second = (run(fused, *given) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_no_rows_and_repeat(isa, dtype):
    no_rows_and_repeat(dtype)


def test_triton_no_rows_and_repeat(walk, dtype):
    no_rows_and_repeat(dtype, walk)


def test_triton_not_finite_stays_in_its_row(walk, dtype):
    x = torch.randn(4, 40, device=walk).to(dtype)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    weight = torch.ones(40, device=walk)
    found = run(fused, x, weight, weight, None, torch.ones_like(x), None)
    assert found["y"][1:3].isnan().all() and found["y"][[0, 3]].isfinite().all()
    assert found["dx"][[0, 3]].isfinite().all() and found["dweight"].isnan().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_scales(isa, dtype, scale):
    x, *rest = tensors((16, 200), dtype)
    check((x * (scale if dtype != torch.float16 else scale**0.5)).to(dtype), *rest)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_only_one_gradient(request, name, needed):
    """What is frozen gets no gradient, and the others' bits stay."""
    device = request.getfixturevalue("triton") if name == "triton" else "cpu"
    x, weight, bias, _, dy, _ = tensors((70, 33), torch.float32, device=device)
    with backend.use_backend(name):
        every = run(fused, x, weight, bias, None, dy, None)
        leaves = {"x": x, "weight": weight, "bias": bias}
        leaf = leaves[needed] = leaves[needed].clone().requires_grad_()
        ops.layer_norm(*leaves.values()).backward(dy)
    assert torch.equal(leaf.grad, every[f"d{needed}"])
    assert all(t.grad is None for t in leaves.values() if t is not leaf)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 300),
    residual=st.booleans(),
    parameters=st.sampled_from([*PARAMETERS.values()]),
)
def test_any_shape_agrees_with_reference(rows, width, residual, parameters):
    given = tensors((rows, width), torch.float32, parameters, residual)
    mine = run(fused, *given)
    with backend.use_backend("reference"):
        theirs = run(fused, *given)
    # rstd, which multiplies each gradient, reaches 1 / sqrt(eps) where a row has few elements
    x, _, _, r, *_ = given
    h = x if r is None else x + r
    rstd = (h.var(-1, correction=0) + 1e-5).rsqrt().amax().item() if rows else 1.0
    for name, t in mine.items():
        near = 1e-4 * max(1, rows) ** 0.5 * max(1.0, rstd)  # sums over rows grow with sqrt(rows)
        torch.testing.assert_close(t, theirs[name], rtol=1e-4, atol=near, msg=name)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32), (32,)])
@given_parameters
def test_opcheck(residual, shape, parameters):
    x, weight, bias, r, _, _ = (
        None if t is None else t.requires_grad_()
        for t in tensors(shape, torch.float32, parameters, residual)
    )
    torch.library.opcheck(torch.ops.fastlm.layer_norm.default, (x, r, weight, bias, 1e-5))


@given_parameters
def test_gradcheck_of_the_reference(parameters):
    given = tensors((5, 7), torch.float64, parameters, residual=True)[:4]
    leaves = [None if t is None else t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(fused, leaves)


def test_compiles_without_break_or_recompile():
    weight, bias = (torch.randn(64).requires_grad_() for _ in range(2))
    assert_compiles_once(
        lambda x, w, b: ops.layer_norm(x, w, b, residual=x * 2)[0],
        [(torch.randn(n, 64, requires_grad=True), weight, bias) for n in (4, 9, 17)],
    )


def test_refusals():
    x, w = torch.randn(2, 8), torch.randn(8)
    for call, message in {
        lambda: ops.layer_norm(x, torch.randn(7)): r"weight: expected floats \(8,\) on cpu as x"
        r" \(2, 8\), got torch.float32 \(7,\) on cpu",
        lambda: ops.layer_norm(x, w, w.to(torch.complex64)): r"bias: expected floats .*complex64",
        lambda: ops.layer_norm(x, w, w, residual=x.bfloat16()): "residual: expected torch.float32"
        r" \(2, 8\) on cpu as x, got torch.bfloat16",
        lambda: ops.layer_norm(torch.empty(3, 0)): r"x: expected floats \(..., H\), H >= 1",
        lambda: ops.layer_norm(x.long(), w): r"x: expected floats .* got torch.int64 \(2, 8\)",
        lambda: ops.layer_norm(x, (8,), w): r"weight: .*no normalized_shape.*got \(8,\)",
        lambda: ops.layer_norm(x, w, w, None): "eps: wanted a number, got None",
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    with (
        backend.use_backend("cpu"),
        pytest.raises(InputError, match=r"cpu serves float32, bfloat16, float16, not float64"),
    ):
        ops.layer_norm(x.double())
