"""rms_norm's Triton kernels against float64, interpreted if there is no GPU."""

import sys

import pytest
import test_rms_norm
import torch

from fastlm import ops


@pytest.fixture(params=["whole rows", "wide rows"])
def walk(request, monkeypatch, triton):
    """Small rows also use the path for wide ones, in blocks that do not divide them."""
    if request.param == "wide rows":
        ops.rms_norm(torch.ones(1, 1, device=triton), torch.ones(1, device=triton))  # imports it
        module = sys.modules["fastlm.kernels.rms_norm"]
        monkeypatch.setattr(module, "_WHOLE", 0)
        monkeypatch.setattr(module, "_WIDE", module.Config({"BLOCK": 128}))
        monkeypatch.setattr(module, "_COLUMNS", module.Config({"BLOCK": 128}))
    return triton


# several rows per program and a ragged tile of them, one element, more rows than programs
@pytest.mark.parametrize(
    "shape", [(4, 512), (13, 107), (3, 5, 64), (2, 1), (70, 17), (18, 1100)], ids=str
)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_matches_float64(walk, dtype, shape, with_residual, offset):
    if with_residual != bool(offset) and (dtype != torch.float32 or max(shape) > 500):
        return  # half of the combinations are enough
    test_rms_norm.check(dtype, shape, with_residual, offset, walk)


@pytest.mark.parametrize("shape", [(13, 107), (18, 1100)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_without_a_weight(walk, dtype, shape, with_residual):
    test_rms_norm.check(dtype, shape, with_residual, 0.0, walk, with_weight=False)


def test_wide_rows_by_their_own_blocks(triton):
    test_rms_norm.check(torch.bfloat16, (3, 8200), True, 0.0, triton)
    test_rms_norm.check(torch.float32, (2, 8192), False, 0.0, triton)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_of_another_dtype(walk, dtype, weight_dtype):
    x, dy = torch.randn(2, 5, 96, device=walk).to(dtype).unbind(0)
    weight = torch.randn(96, device=walk).to(weight_dtype)
    narrow = test_rms_norm.run(test_rms_norm.fused, x, weight, None, dy, None)
    wide = test_rms_norm.run(test_rms_norm.fused, x, weight.float(), None, dy, None)
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])
    assert narrow[2].dtype == weight_dtype and torch.equal(narrow[2], wide[2].to(weight_dtype))


def test_rows_apart_and_transposed(walk, dtype):
    base = torch.randn(40, 96, device=walk).to(dtype)
    for x in (base[:, 10:42], base[::3, :32], base[:32].t()[:40], base[:1, :32].expand(5, 32)):
        weight = torch.randn(x.shape[-1], 2, device=walk)[:, 0]
        mine = test_rms_norm.run(test_rms_norm.fused, x, weight, x, x, x)
        plain = [t.contiguous() for t in (x, weight, x, x, x)]
        theirs = test_rms_norm.run(test_rms_norm.fused, *plain)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(mine, theirs))


def test_no_rows_and_repeat(walk, dtype):
    weight = torch.randn(8, device=walk)
    none = torch.empty(0, 8, dtype=dtype, device=walk)
    y, dx, dweight = test_rms_norm.run(test_rms_norm.fused, none, weight, None, none, None)
    assert y.shape == dx.shape == (0, 8) and (dweight == 0).all()
    x, dy = torch.randn(2, 9, 257, device=walk).to(dtype).unbind(0)
    weight = torch.randn(257, device=walk)
    first, second = (
        test_rms_norm.run(test_rms_norm.fused, x, weight, None, dy, None) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_not_finite_stays_in_its_row(walk, dtype):
    x, weight = torch.randn(4, 40, device=walk).to(dtype), torch.ones(40, device=walk)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y, dx, dweight = test_rms_norm.run(
        test_rms_norm.fused, x, weight, None, torch.ones_like(x), None
    )
    assert y[1].isnan().all() and y[2, 39].isnan() and (y[2, :39] == 0).all()
    assert y[[0, 3]].isfinite().all() and dx[[0, 3]].isfinite().all() and dweight.isnan().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_scales(walk, dtype, scale):
    x = torch.randn(6, 200, device=walk)
    x = (x * (scale if dtype != torch.float16 else scale**0.5)).to(dtype)
    weight = torch.randn(200, device=walk).to(dtype)
    plain = test_rms_norm.naive(x, weight, 1e-6, 0.0)[0]
    truth = test_rms_norm.naive(x.double(), weight.double(), 1e-6, 0.0)[0]
    test_rms_norm.assert_near(ops.rms_norm(x, weight), plain, truth)
