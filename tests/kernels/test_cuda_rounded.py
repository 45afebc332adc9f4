"""Kernels that return their result in int8, against the op followed by quantized_linear's rounding,
on the emulator if there is no GPU.
"""

import pytest
import torch

from fastlm import ops
from fastlm.cuda import extension, quantized_linear, stream
from fastlm.cuda.glu import glu_round
from fastlm.cuda.quantized_linear import Rounded, rounded_linear
from fastlm.cuda.rms_norm import rms_norm_round

# (rows, width, group size): whole and cut runs, several groups, a short last one; in vectors and
# element by element; more runs than warps in a block
SHAPES = [(3, 512, 128), (1, 2080, 2080), (2, 77, 32), (5, 40, 8), (2, 1400, 512), (1, 2568, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_bits = pytest.mark.parametrize("bits", [4, 8])


def weight(width, bits, group_size, device):
    return ops.quantize_weight(torch.randn(16, width, device=device), bits, group_size=group_size)


def rounded(x, into):
    return quantized_linear.rounded(x, into.qdata, into.scales, into.bits, into.group_size)


def assert_equal(got, wanted, into):
    rows = len(wanted.q)
    assert torch.equal(got.q, wanted.q) and got[3:] == wanted[3:]
    for a, b in zip(got[1:3], wanted[1:3]):  # columns are padded to 64
        assert torch.equal(a[:, :rows].nan_to_num(7e7), b[:, :rows].nan_to_num(7e7))
    w = into.qdata, into.scales, into.zeros, None, into.bits, into.group_size
    assert rounded_linear(got, *w).shape == (*wanted.shape[:-1], 16)


@shapes
@each_bits
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_round(cuda, dtype, shape, bits, with_residual):
    rows, width, group_size = shape
    x, r = torch.randn(2, rows, width, device=cuda).to(dtype).unbind(0)
    w, into = torch.randn(width, device=cuda).to(dtype), weight(width, bits, group_size, cuda)
    got, h = rms_norm_round(x, r if with_residual else None, w, 1e-5, 1.0, into)
    if with_residual:
        y, wanted_h = ops.rms_norm(x, w, 1e-5, residual=r, offset=1.0)
        assert torch.equal(h, wanted_h)
    else:
        y = ops.rms_norm(x, w, 1e-5, offset=1.0)
        assert h is x
    assert_equal(got, rounded(y, into), into)


@shapes
@each_bits
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu"])
def test_glu_round(cuda, dtype, shape, bits, act):
    rows, width, group_size = shape
    both = torch.randn(rows, 2 * width, device=cuda).to(dtype)
    gate, up = both.chunk(2, -1)
    into = weight(width, bits, group_size, cuda)
    wanted = rounded(ops.glu(gate, up, act=act), into)
    assert_equal(glu_round(gate, up, act, into), wanted, into)
    assert_equal(glu_round(gate.contiguous(), up.contiguous(), act, into), wanted, into)


def test_rows_of_a_batch_apart_and_a_weight_of_another_dtype(cuda):
    base = torch.randn(2, 3, 96, device=cuda).bfloat16()
    into, w = weight(64, 8, 32, cuda), torch.randn(64, device=cuda)
    x, r = base[:, :, 16:80], base[:, :, 32:]
    y, wanted_h = ops.rms_norm(x, w, residual=r)
    got, h = rms_norm_round(x, r, w, 1e-6, 0.0, into)
    assert torch.equal(h, wanted_h)
    assert_equal(got, rounded(y, into), into)


def test_a_run_with_nan_or_infinity_is_nan(cuda):
    """The same as with rounding afterwards: the row's other runs of a gate are unaffected."""
    gate, up = torch.randn(2, 2, 64, device=cuda).unbind(0)
    up[0, 40], gate[1, 3] = torch.inf, torch.nan
    into = weight(64, 8, 32, cuda)
    got = glu_round(gate, up, "silu", into)
    assert_equal(got, rounded(ops.glu(gate, up), into), into)
    assert got.scale[:, :2].isnan().tolist() == [[False, True], [True, False]]
    x = torch.randn(2, 64, device=cuda)
    x[1, 5] = torch.nan
    w = torch.ones(64, device=cuda)
    got, _ = rms_norm_round(x, None, w, 1e-6, 0.0, into)
    assert_equal(got, rounded(ops.rms_norm(x, w), into), into)
    assert got.scale[:, :2].isnan().tolist() == [[False, True]] * 2


def test_refusals(cuda):
    x, w, into = (
        torch.zeros(2, 64, device=cuda),
        torch.ones(64, device=cuda),
        weight(64, 8, 32, cuda),
    )
    out = Rounded.empty(x, into.scales, 32)
    codes = into.qdata, into.scales, 8, 32
    kernels = extension()
    with pytest.raises(ValueError, match="q: wanted columns 64, got 48"):
        narrow = out.q[:, :48].contiguous()
        kernels.glu_round(x, x, 0, *codes, narrow, out.scale, out.sums, stream(x))
    with pytest.raises(ValueError, match="x_sums: wanted rows 2, got 1"):
        kernels.glu_round(x, x, 0, *codes, out.q, out.scale, out.sums[:1], stream(x))
    with pytest.raises(ValueError, match="act: wanted 0 to 2, got 3"):
        kernels.glu_round(x, x, 3, *codes, *out[:3], stream(x))
    with pytest.raises(ValueError, match="weight: wanted size 64, got 63"):
        kernels.rms_norm_round(x, None, w[:63], 1e-6, 0.0, None, *codes, *out[:3], stream(x))
    with pytest.raises(ValueError, match="x: wanted elements 128, got 64"):
        kernels.rms_norm_round(x[:1], None, w, 1e-6, 0.0, None, *codes, *out[:3], stream(x))
