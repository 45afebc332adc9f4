"""rms_norm's CUDA kernel against float64, on the emulator if there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_near

from fastlm import ops

# one, two, four vectors per thread and the kernel of wide rows; with vectors and element by element
SHAPES = [(4, 512), (3, 507), (2, 2, 64), (2, 1), (1, 2056), (1, 4104), (1, 1025), (2, 9001)]


def check(x, weight, residual=None, offset=0.0):
    out = ops.rms_norm(x, weight, 1e-5, residual=residual, offset=offset)
    y, h = out if residual is not None else (out, x)
    wanted_h = x if residual is None else x + residual
    assert torch.equal(h, wanted_h)

    def norm(h, weight):
        return F.rms_norm(h, h.shape[-1:], (offset + weight).to(h.dtype), 1e-5)

    assert_near(y, norm(wanted_h, weight), norm(wanted_h.double(), weight.double()), what="y")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_float64(cuda, dtype, shape, with_residual):
    x, r = torch.randn(2, *shape, device=cuda).to(dtype).unbind(0)
    weight = torch.randn(shape[-1], device=cuda).to(dtype)
    check(x, weight, r if with_residual else None, offset=float(with_residual))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_of_another_dtype(cuda, dtype, weight_dtype):
    x = torch.randn(3, 96, device=cuda).to(dtype)
    weight = torch.randn(96, device=cuda).to(weight_dtype)
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x, weight.float()))


def test_rows_apart_unaligned_and_transposed(cuda, dtype):
    base = torch.randn(40, 96, device=cuda).to(dtype)
    for x in (base[:, 10:42], base[:, 16:48], base[::3, :32], base[:32].t()[:40], base[:0]):
        weight = torch.randn(x.shape[-1], 2, device=cuda)[:, 0]
        check(x, weight.to(dtype), residual=x)


def test_repeats_bit_for_bit(cuda):
    x = torch.randn(5, 3000, device=cuda)
    weight = torch.randn(3000, device=cuda)
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x, weight))
