"""Tests of rms_norm beyond its table of cases (cases/rms_norm.py)."""

import pytest
import torch
from cases.base import assert_same, run
from contract import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, backend, ops


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_of_another_dtype(op, kernel, dtype, weight_dtype):
    """It is widened, and its gradient is rounded once."""
    x, weight = torch.randn(5, 96).to(kernel.device, dtype), torch.randn(96).to(kernel.device)
    weight = weight.to(weight_dtype)
    differentiable = kernel.language not in op.forward_only
    narrow, _ = run(ops.rms_norm, [x, weight], differentiable=differentiable)
    wide, _ = run(ops.rms_norm, [x, weight.float()], differentiable=differentiable)
    assert_same([t.to(n.dtype) for t, n in zip(wide, narrow)], narrow, "weight")


def test_not_finite_stays_in_its_row(op, kernel, dtype):
    x, weight = torch.randn(4, 40).to(kernel.device, dtype), torch.ones(40, device=kernel.device)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y, *gradients = run(
        ops.rms_norm, [x, weight], differentiable=kernel.language not in op.forward_only
    )[0]
    assert y[1].isnan().all() and y[2, 39].isnan() and (y[2, :39] == 0).all()
    assert y[[0, 3]].isfinite().all()
    if gradients:
        dx, dweight = gradients
        assert dx[[0, 3]].isfinite().all() and dweight.isnan().all()


@on("cpu")
def test_leading_dimensions(kernel):
    """(..., H) equals its rows, and a row alone the same row of many."""
    x, weight = torch.randn(4, 3, 2, 33), torch.randn(33)
    y = ops.rms_norm(x, weight)
    assert torch.equal(y.view(-1, 33), ops.rms_norm(x.view(-1, 33), weight))
    assert torch.equal(y[1, 2, 1], ops.rms_norm(x[1, 2, 1], weight))


def test_refusals():
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match=r"weight: expected shape \(H,\) .*\(2, 8\), got \(7,\)"):
        ops.rms_norm(x, torch.randn(7))
    with pytest.raises(
        InputError,
        match=r"residual: expected torch.float32 of shape \(2, 8\) as x on cpu, got torch.bfloat16",
    ):
        ops.rms_norm(x, torch.randn(8), residual=x.bfloat16())
    with pytest.raises(InputError, match=r"x: expected shape \(..., H\), H >= 1, got \(3, 0\)"):
        ops.rms_norm(torch.empty(3, 0), torch.empty(0))
    with pytest.raises(
        InputError, match=r"weight: expected floats on cpu as x, got torch\.complex"
    ):
        ops.rms_norm(x, torch.ones(8, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"x: expected a float dtype, got torch\.int64"):
        ops.rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.randn(8))
    with (
        backend.use_backend("cpu"),
        pytest.raises(InputError, match=r"cpu supports float32, bfloat16, float16, not float64"),
    ):
        ops.rms_norm(x.double(), torch.randn(8).double())
