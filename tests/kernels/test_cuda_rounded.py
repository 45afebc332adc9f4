"""Kernels that return their result in int8, against the op followed by quantized_linear's rounding,
on the emulator if there is no GPU.
"""

import pytest
import torch

from fastlm import InputError, backend, ops, reference
from fastlm.cuda import extension, quantized_linear, stream
from fastlm.ops.glu import glu_round
from fastlm.ops.quantized_linear import rounded_linear
from fastlm.ops.rms_norm import rms_norm_round

# (rows, width, group size): whole and cut runs, several groups, a short last one; in vectors and
# element by element; more runs than warps in a block
SHAPES = [(3, 512, 128), (1, 2080, 2080), (2, 77, 32), (5, 40, 8), (2, 1400, 512), (1, 2568, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_bits = pytest.mark.parametrize("bits", [4, 8])


def weight(width, bits, group_size, device):
    return ops.quantize_weight(torch.randn(16, width, device=device), bits, group_size=group_size)


def norm(x, residual, weight, into, eps=1e-6, offset=0.0):
    format = into.bits, into.group_size
    return rms_norm_round(x, residual, weight, into.qdata, into.scales, eps, offset, *format)


def gated(gate, up, into, act="silu"):
    return glu_round(gate, up, into.qdata, into.scales, act, into.bits, into.group_size)


def assert_rounded(got, x, into):
    """The definition's int8 rows of x, and the product that `quantized_linear` has."""
    rows = x.numel() // x.shape[-1]
    wanted = reference.int8_rows(x, into.bits, into.group_size)
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(got[0], wanted[0])
    for a, b in zip(got[1:], wanted[1:]):  # columns are padded to 64
        assert torch.equal(a[:, :rows].nan_to_num(7e7), b[:, :rows].nan_to_num(7e7))
    k = x.shape[-1]
    w = into.qdata, into.scales, into.zeros, None, into.bits, into.group_size, k, x.dtype
    y = ops.quantized_linear(x, into, act_bits=8).view(rows, -1)
    assert torch.equal(rounded_linear(*got, *w).nan_to_num(7e7), y.nan_to_num(7e7))
    with backend.use_backend("reference"):
        near = rounded_linear(*wanted, *w)
        assert torch.equal(
            near.nan_to_num(7e7),
            ops.quantized_linear(x, into, act_bits=8).nan_to_num(7e7).view(rows, -1),
        )


@shapes
@each_bits
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_round(cuda, dtype, shape, bits, with_residual):
    rows, width, group_size = shape
    x, r = torch.randn(2, rows, width, device=cuda).to(dtype).unbind(0)
    w, into = torch.randn(width, device=cuda).to(dtype), weight(width, bits, group_size, cuda)
    *got, h = norm(x, r if with_residual else None, w, into, 1e-5, 1.0)
    if with_residual:
        y, wanted_h = ops.rms_norm(x, w, 1e-5, residual=r, offset=1.0)
        assert torch.equal(h, wanted_h)
    else:
        y = ops.rms_norm(x, w, 1e-5, offset=1.0)
        assert h.shape == (0,)
    assert_rounded(got, y, into)


@shapes
@each_bits
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu"])
def test_glu_round(cuda, dtype, shape, bits, act):
    rows, width, group_size = shape
    both = torch.randn(rows, 2 * width, device=cuda).to(dtype)
    gate, up = both.chunk(2, -1)
    into = weight(width, bits, group_size, cuda)
    wanted = ops.glu(gate, up, act=act)
    assert_rounded(gated(gate, up, into, act), wanted, into)
    assert_rounded(gated(gate.contiguous(), up.contiguous(), into, act), wanted, into)


def test_rows_of_a_batch_apart_and_a_weight_of_another_dtype(cuda):
    base = torch.randn(2, 3, 96, device=cuda).bfloat16()
    into, w = weight(64, 8, 32, cuda), torch.randn(64, device=cuda)
    x, r = base[:, :, 16:80], base[:, :, 32:]
    y, wanted_h = ops.rms_norm(x, w, residual=r)
    *got, h = norm(x, r, w, into)
    assert torch.equal(h, wanted_h)
    assert_rounded(got, y, into)


def test_a_run_with_nan_or_infinity_is_nan(cuda):
    """The same as with rounding afterwards: the row's other runs of a gate are unaffected."""
    gate, up = torch.randn(2, 2, 64, device=cuda).unbind(0)
    up[0, 40], gate[1, 3] = torch.inf, torch.nan
    into = weight(64, 8, 32, cuda)
    got = gated(gate, up, into)
    assert_rounded(got, ops.glu(gate, up), into)
    assert got[1][:, :2].isnan().tolist() == [[False, True], [True, False]]
    x = torch.randn(2, 64, device=cuda)
    x[1, 5] = torch.nan
    w = torch.ones(64, device=cuda)
    *got, _ = norm(x, None, w, into)
    assert_rounded(got, ops.rms_norm(x, w), into)
    assert got[1][:, :2].isnan().tolist() == [[False, True]] * 2


def test_a_run_without_columns(cuda):
    """The last group ends within the first of its two runs."""
    gate, up = torch.randn(2, 3, 1500, device=cuda).unbind(0)
    into = weight(1500, 4, 1024, cuda)
    assert into.scales.shape[1] == 2
    assert_rounded(gated(gate, up, into), ops.glu(gate, up), into)


def test_rows_that_do_not_fit_are_refused(cuda):
    x, into = torch.zeros(1, 12296, device=cuda), weight(12296, 8, 8, cuda)
    assert not backend.has_kernel("rms_norm_round", x)
    assert backend.has_kernel("rms_norm_round", x[:, :12288])
    with pytest.raises(InputError, match="it has rms_norm_round for rows of up to 48 KiB"):
        norm(x, None, torch.ones(12296, device=cuda), into)


def test_opcheck():
    """Where no kernel serves, the definition does."""
    x, w, into = torch.randn(3, 40), torch.randn(40), weight(40, 4, 8, "cpu")
    codes, format = (into.qdata, into.scales), (4, 8)
    fastlm = torch.ops.fastlm
    *rows, _ = norm(x, x, w, into)
    torch.library.opcheck(fastlm.rms_norm_round, (x, x, w, *codes, 1e-6, 0.0, *format))
    torch.library.opcheck(fastlm.glu_round, (x, x, *codes, "silu", *format))
    product = (*rows, *codes, into.zeros, torch.randn(16), *format, 40, x.dtype)
    torch.library.opcheck(fastlm.rounded_linear, product)


def test_refusals(cuda):
    x, w, into = (
        torch.zeros(2, 64, device=cuda),
        torch.ones(64, device=cuda),
        weight(64, 8, 32, cuda),
    )
    q, scale, sums = out = quantized_linear.empty_rows(x, 32)
    codes = into.qdata, into.scales, 8, 32
    kernels = extension()
    with pytest.raises(ValueError, match="q: wanted columns 64, got 48"):
        narrow = q[:, :48].contiguous()
        kernels.glu_round(x, x, 0, *codes, narrow, scale, sums, stream(x))
    with pytest.raises(ValueError, match="x_sums: wanted rows 2, got 1"):
        kernels.glu_round(x, x, 0, *codes, q, scale, sums[:1], stream(x))
    with pytest.raises(ValueError, match="act: expected 0 to 3, got 4"):
        kernels.glu_round(x, x, 4, *codes, *out, stream(x))
    with pytest.raises(ValueError, match="weight: wanted size 64, got 63"):
        kernels.rms_norm_round(x, None, w[:63], 1e-6, 0.0, None, *codes, *out, stream(x))
    with pytest.raises(ValueError, match="x: wanted elements 128, got 64"):
        kernels.rms_norm_round(x[:1], None, w, 1e-6, 0.0, None, *codes, *out, stream(x))
