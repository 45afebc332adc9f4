"""glu's CUDA kernel against float64, on the emulator if there is no GPU."""

import pytest
import test_triton_glu as on_triton
import torch
from test_glu import ACT_ERROR, ACTS, naive
from tolerance import ULP, assert_near

from fastlm import ops


def check(gate, up, act):
    truth = naive(gate.double(), up.double(), act)
    floor = None
    if truth.numel():  # error of act in float32, whatever the size of the product with up
        largest = max(truth.abs().max().item(), 1e-30)
        floor = ACT_ERROR * max(1.0, up.abs().max().item() / largest)
        floor = max(floor, ULP[gate.dtype])
    assert_near(ops.glu(gate, up, act=act), naive(gate, up, act), truth, floor=floor, what=act)


# a block and more, in vectors and element by element, less than a warp, empty
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(5, 512), (9, 233), (3, 5, 64), (7,), (), (0, 8), (3, 0)])
def test_matches_float64(cuda, dtype, act, shape):
    check(*(3 * torch.randn(2, *shape, device=cuda)).to(dtype).unbind(0), act)


@pytest.mark.parametrize("width", [64, 77, 2100])
def test_rows_apart(cuda, dtype, width):
    both = torch.randn(3, 2, 2 * width, device=cuda).to(dtype)
    gate, up = both.chunk(2, -1)
    apart = ops.glu(gate.contiguous(), up.contiguous())
    assert torch.equal(ops.glu(gate, up), apart) and ops.glu(gate, up).is_contiguous()
    assert torch.equal(ops.glu(gate, up.contiguous()), apart)
    assert torch.equal(ops.glu(gate.mT.contiguous().mT, up), apart)  # strided elements
    odd = torch.cat([up, up[..., :1]], -1)[..., :width]  # every second row is misaligned
    assert torch.equal(ops.glu(gate, odd), apart) and torch.equal(
        ops.glu(odd, gate), ops.glu(up, gate)
    )
    check(gate[0], up[0], "silu")


def test_operands_between_16_bytes(cuda, dtype):
    base = torch.randn(2, 300, device=cuda).to(dtype)
    check(base[0, 1:297], base[1, :296], "gelu")
    check(base[0, :296], base[1, 1:297], "gelu")


@pytest.mark.parametrize("act", ACTS)
def test_every_gate(cuda, act):
    """The whole range of a gate: tails, zeros of both signs; up = 1, in float32."""
    gate = torch.arange(-(2**15), 2**15, 16, dtype=torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() < 1e18)].to(cuda)  # x^3 overflows beyond, as in torch
    y = ops.glu(gate.float(), torch.ones_like(gate).float(), act=act)
    truth = naive(gate.double(), torch.ones_like(gate).double(), act)
    assert ((y.double() - truth).abs() / truth.abs().clamp_min(1.0)).max() < ACT_ERROR


@pytest.mark.parametrize("act", ACTS)
def test_infinities_and_nan(cuda, act):
    on_triton.test_infinities_and_nan(cuda, act)


def test_refusals(cuda):
    from fastlm.cuda import extension

    x = torch.zeros(4, 8, device=cuda)
    with pytest.raises(ValueError, match="up: wanted elements 32, got 16"):
        extension().glu_forward(x, x[:2], 0, x, 0)
    with pytest.raises(ValueError, match="act: expected 0 to 3, got 4"):
        extension().glu_forward(x, x, 4, x, 0)
    with pytest.raises(ValueError, match="gate, up: wanted rows whose elements lie side by side"):
        extension().glu_forward(x.view(8, 4)[:, ::2], x.view(8, 4)[:, ::2], 0, x[:2], 0)
    with pytest.raises(ValueError, match="gate: wanted float32, bfloat16 or float16, got int64"):
        extension().glu_forward(x.long(), x.long(), 0, x, 0)
