"""Tests of glu beyond its table of cases (cases/glu.py)."""

import pytest
import torch
from cases.base import assert_same, run
from cases.glu import ACTS, activation
from contract import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, ops

each_act = pytest.mark.parametrize("act", ACTS)


@each_act
def test_every_gate(op, kernel, act):
    """The whole range of a gate: tails, zeros of both signs, denormals; up = dy = 1. In float32 the
    error of act and act' is 8 roundings of max(1, |value|), or 32 where act' is computed as x times
    the difference of 1 and a sigmoid.
    """
    roundings = 32 if kernel.language == "triton" else 8
    few = 1 if kernel.language == "cpu" else 16
    gate = torch.arange(-(2**15), 2**15, few, dtype=torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() < 1e18)]  # gelu_tanh's x^3 overflows beyond, as torch
    gate = gate.to(kernel.device)
    ones = torch.ones_like(gate)
    actual, _ = run(
        lambda gate, up: ops.glu(gate, up, act=act),
        [gate.float(), ones.float()],
        [ones],
        differentiable=kernel.language not in op.forward_only,
    )
    truth, _ = run(
        lambda gate, up: activation(gate, act) * up, [gate.double(), ones.double()], [ones]
    )
    for name, a, t in zip(("y", "dgate", "dup"), actual, truth):
        error = (a.double() - t).abs() / t.abs().clamp_min(1.0)
        assert error.max() < roundings * 2**-24, (
            f"{name}: {error.max():.2e} at {gate[error.argmax()].item()}"
        )


@each_act
def test_infinities_and_nan(kernel, act):
    gate = torch.tensor([float("inf"), float("nan"), 1.0, 50.0, -200.0], device=kernel.device)
    up = torch.tensor([2.0, 1.0, float("nan"), 1.0, 1.0], device=kernel.device)
    y = ops.glu(gate, up, act=act)
    assert y[0] == float("inf") and y[1].isnan() and y[2].isnan()
    assert y[3] == (2500 if act == "relu2" else 50) and y[4].abs() < 1e-30


@pytest.mark.parametrize("width", [64, 77, 2100])
def test_halves_of_one_projection(op, kernel, dtype, width):
    """Rows of which every second one is misaligned, elements apart, a gradient of stride 0."""
    both = torch.randn(2, 3, 2 * width).to(kernel.device, dtype)
    gate, up = both.chunk(2, -1)
    odd = torch.cat([up, up[..., :1]], -1)[..., :width]
    differentiable = kernel.language not in op.forward_only
    upstream = torch.ones((), device=kernel.device, dtype=dtype).expand(2, 3, width)
    assert ops.glu(gate, up).is_contiguous()
    expected, _ = run(
        ops.glu, [gate.contiguous(), up.contiguous()], [upstream], differentiable=differentiable
    )
    for views in ((gate, up), (gate, odd), (gate.mT.contiguous().mT, up)):
        actual, _ = run(ops.glu, views, [upstream], differentiable=differentiable)
        assert_same(expected, actual, "views")
    assert torch.equal(ops.glu(odd, gate), ops.glu(up, gate))


@on("cuda")
def test_operands_between_16_bytes(kernel, dtype):
    base = torch.randn(2, 300, device=kernel.device).to(dtype)
    for i, j in ((1, 0), (0, 1)):
        gate, up = base[0, i : 296 + i], base[1, j : 296 + j]
        expected = ops.glu(gate.clone(), up.clone(), act="gelu")
        assert torch.equal(ops.glu(gate, up, act="gelu"), expected)


def test_refusals():
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match=r"act: expected one of .*, relu2, got 'relu'"):
        ops.glu(x, x, act="relu")
    with pytest.raises(InputError, match=r"up: expected torch.float32 \(2, 8\) .* \(2, 7\)"):
        ops.glu(x, x[:, :7])
    with pytest.raises(InputError, match=r"up: expected torch.float32 .* got torch.float16"):
        ops.glu(x, x.half())
    with pytest.raises(InputError, match="gate: expected a float dtype"):
        ops.glu(x.long(), x.long())


@on("cuda")
def test_the_extension_refuses(kernel):
    from fastlm.cuda import extension

    x = torch.zeros(4, 8, device=kernel.device)
    with pytest.raises(ValueError, match="up: expected elements 32, got 16"):
        extension().glu_forward(x, x[:2], 0, x, 0)
    with pytest.raises(ValueError, match="act: expected 0 to 3, got 4"):
        extension().glu_forward(x, x, 4, x, 0)
    with pytest.raises(ValueError, match="gate, up: expected rows whose elements lie side by side"):
        extension().glu_forward(x.view(8, 4)[:, ::2], x.view(8, 4)[:, ::2], 0, x[:2], 0)
    with pytest.raises(ValueError, match="gate: expected float32, bfloat16 or float16, got int64"):
        extension().glu_forward(x.long(), x.long(), 0, x, 0)
