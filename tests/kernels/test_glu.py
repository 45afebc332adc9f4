"""glu: three activations on every instruction set against float64, strides, compile, refusals."""

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULP, assert_near

from fastlm import InputError, ops

ACTS = ("silu", "gelu_tanh", "gelu", "relu2")


def naive(gate, up, act="silu"):
    if act == "silu":
        return F.silu(gate) * up
    if act == "relu2":
        return F.relu(gate).square() * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def run(function, gate, up, dy, act):
    gate, up = (t.detach().requires_grad_() for t in (gate, up))
    y = function(gate, up, act=act)
    return [y.detach(), *torch.autograd.grad(y, (gate, up), dy)]


# Error of act and act' in float32, relative to max(1, |value|), at every bfloat16 gate. gelu near
# -5 is x times an absolute error of erf.
ACT_ERROR = 5e-7


def check(gate, up, dy, act, what, act_error=None):
    """Compare with float64. act_error: allowed error of act and act' in float32, whatever the size
    of the product with up and dy. A product near zero needs it, because plain torch may happen to
    be exact there.
    """
    actual, plain = (run(f, gate, up, dy, act) for f in (ops.glu, naive))
    truth = run(naive, gate.double(), up.double(), dy.double(), act)
    for name, a, p, t, rest in zip(("y", "dgate", "dup"), actual, plain, truth, (up, up * dy, dy)):
        floor = None
        if act_error and t.numel():
            floor = act_error * max(1.0, rest.abs().max().item() / max(t.abs().max().item(), 1e-30))
            floor = max(floor, ULP[a.dtype])
        assert_near(a, p, t, factor=2 if name == "y" else 3, floor=floor, what=f"{name} {what}")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(4, 512), (252, 507), (1, 123), (3, 5, 64), (7,), ()], ids=str)
def test_matches_float64(isa, dtype, act, shape):
    gate, up, dy = (3 * torch.randn(3, *shape)).to(dtype).unbind(0)
    check(gate, up, dy, act, isa)


@pytest.mark.parametrize("act", ACTS)
def test_every_bfloat16_gate(isa, act):
    # the whole range of a gate: tails, zeros of both signs, denormals; up = dy = 1
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    gate = gate[
        gate.isfinite() & (gate.abs() < 1e18)
    ]  # x^3 of gelu_tanh overflows beyond, as in torch
    one = torch.ones_like(gate)
    actual, truth = (
        run(f, *(t.to(d) for t in (gate, one, one)), act)
        for f, d in ((ops.glu, torch.float32), (naive, torch.float64))
    )
    for name, a, t in zip(("y", "dgate", "dup"), actual, truth):
        error = (a.double() - t).abs() / t.abs().clamp_min(1.0)
        assert error.max() < ACT_ERROR, (
            f"{name}: {error.max():.2e} at {gate[error.argmax()].item()}"
        )


@pytest.mark.parametrize("act", ACTS)
def test_infinities_and_nan(isa, act):
    gate = torch.tensor([float("inf"), float("nan"), 1.0, 50.0, -200.0])
    up = torch.tensor([2.0, 1.0, float("nan"), 1.0, 1.0])
    y = ops.glu(gate, up, act=act)
    assert y[0] == float("inf") and y[1].isnan() and y[2].isnan()
    assert y[3] == (2500 if act == "relu2" else 50) and y[4].abs() < 1e-30


@pytest.mark.parametrize("act", ACTS)
def test_halves_of_one_projection(isa, dtype, act):
    both = torch.randn(6, 10, 2 * 77).to(dtype)
    gate, up = both.chunk(2, -1)
    dy = torch.randn(6, 10, 77).to(dtype)
    apart = run(ops.glu, gate.contiguous(), up.contiguous(), dy, act)
    views = [(gate, up, dy), (gate, up.contiguous(), dy.mT.contiguous().mT)]
    for view in views:
        assert all(torch.equal(a, b) for a, b in zip(run(ops.glu, *view, act), apart))
    scalar_grad = torch.ones(()).to(dtype).expand(6, 10, 77)
    for a, b in zip(
        run(ops.glu, gate, up, scalar_grad, act),
        run(ops.glu, gate, up, scalar_grad.contiguous(), act),
    ):
        assert torch.equal(a, b)


def test_empty_repeat_and_threads(isa, dtype):
    for shape in ((0, 8), (3, 0)):
        assert (
            ops.glu(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)).shape == shape
        )
    gate, up, dy = torch.randn(3, 300, 257).to(dtype).unbind(0)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(run(ops.glu, gate, up, dy, "silu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), width=st.integers(0, 300), act=st.sampled_from(ACTS))
def test_any_shape_matches_float64(rows, width, act):
    check(*torch.randn(3, rows, width).unbind(0), act, "any", ACT_ERROR)


@pytest.mark.parametrize("act", ACTS)
def test_opcheck_and_gradcheck(act):
    gate, up = torch.randn(2, 6, 32, requires_grad=True).unbind(0)
    torch.library.opcheck(
        torch.ops.fastlm.glu.default,
        (gate.detach().requires_grad_(), up.detach().requires_grad_(), act),
    )
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: ops.glu(g, u, act=act), (gate, up))


def test_compiles_without_break_or_recompile():
    assert_compiles_once(
        lambda g, u: ops.glu(g * 2, u, act="gelu"),
        [tuple(torch.randn(2, n, 64, requires_grad=True).detach().unbind(0)) for n in (4, 9, 17)],
    )
    calls = [tuple(torch.randn(n, 64, requires_grad=True) for _ in range(2)) for n in (4, 9, 17)]
    assert_compiles_once(lambda g, u: ops.glu(g, u), calls)


def test_refusals():
    x = torch.randn(2, 8)
    with pytest.raises(
        InputError, match="act: wanted one of silu, gelu_tanh, gelu, relu2, got 'relu'"
    ):
        ops.glu(x, x, act="relu")
    with pytest.raises(InputError, match=r"up: wanted torch.float32 \(2, 8\) .* \(2, 7\)"):
        ops.glu(x, x[:, :7])
    with pytest.raises(InputError, match=r"up: wanted torch.float32 .* got torch.float16"):
        ops.glu(x, x.half())
    with pytest.raises(InputError, match="gate: wanted a float dtype"):
        ops.glu(x.long(), x.long())
