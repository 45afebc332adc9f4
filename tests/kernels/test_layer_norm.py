"""Tests of layer_norm beyond its table of cases (cases/layer_norm.py)."""

import pytest
import torch
import torch.nn.functional as F
from cases.base import assert_same, run
from contract import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, backend, ops


def test_a_large_mean_keeps_the_variance(op, kernel, dtype):
    """x - mean is exact to float32 where the mean is many standard deviations (torch's is not)."""
    mean = {torch.float32: 1e4, torch.bfloat16: 100, torch.float16: 1000}[dtype]
    x = (torch.randn(5, 1000) + mean).to(kernel.device, dtype)
    truth = F.layer_norm(x.double(), (1000,))
    # sums of 1,000 terms, and the rounding of the result
    bound = 2**-21 * truth.abs().clamp(1) + torch.finfo(dtype).eps / 2 * truth.abs()
    assert ((ops.layer_norm(x) - truth).abs() <= bound).all()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype(op, kernel, dtype, weight_dtype, bias_dtype):
    """They are widened, and their gradients are rounded once."""
    x, weight, bias = (torch.randn(n, device=kernel.device) for n in ((5, 96), (96,), (96,)))
    leaves = [x.to(dtype), weight.to(weight_dtype), bias.to(bias_dtype)]
    narrow, _ = run(ops.layer_norm, leaves)
    wide, _ = run(ops.layer_norm, [leaves[0], leaves[1].float(), leaves[2].float()])
    assert_same([t.to(n.dtype) for t, n in zip(wide, narrow)], narrow, "parameters")


def test_not_finite_stays_in_its_row(op, kernel, dtype):
    x, weight = torch.randn(4, 40).to(kernel.device, dtype), torch.ones(40, device=kernel.device)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y, dx, dweight, _ = run(ops.layer_norm, [x, weight, weight])[0]
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()
    assert dx[[0, 3]].isfinite().all() and dweight.isnan().all()


@on("cpu")
def test_leading_dimensions(kernel):
    """(..., H) equals its rows, and a row alone the same row of many."""
    x, weight = torch.randn(4, 3, 2, 33), torch.randn(33)
    y = ops.layer_norm(x, weight)
    assert torch.equal(y.view(-1, 33), ops.layer_norm(x.view(-1, 33), weight))
    assert torch.equal(y[1, 2, 1], ops.layer_norm(x[1, 2, 1], weight))


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_only_one_gradient(op, kernel, needed):
    """Frozen parameters get no gradient, and the bits of the others do not change."""
    tensors = [torch.randn(n, device=kernel.device) for n in ((70, 33), (33,), (33,))]
    (_, *grads), (dy,) = run(ops.layer_norm, tensors)
    at = ("x", "weight", "bias").index(needed)
    leaves = [t.requires_grad_(i == at) for i, t in enumerate(tensors)]
    ops.layer_norm(*leaves).backward(dy)
    assert torch.equal(leaves[at].grad, grads[at])
    assert all(t.grad is None for i, t in enumerate(leaves) if i != at)


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
        lambda: ops.layer_norm(x, w, w, None): "eps: expected a number, got None",
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    with (
        backend.use_backend("cpu"),
        pytest.raises(InputError, match=r"cpu supports float32, bfloat16, float16, not float64"),
    ):
        ops.layer_norm(x.double())
