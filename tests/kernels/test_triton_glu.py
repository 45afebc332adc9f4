"""glu's Triton kernels against float64, interpreted if there is no GPU."""

import pytest
import test_glu
import torch

from fastlm import ops


@pytest.mark.parametrize("act", test_glu.ACTS)
@pytest.mark.parametrize("shape", [(4, 512), (25, 507), (1, 2049), (3, 5, 64), (7,), (), (0, 8)])
def test_matches_float64(triton, dtype, act, shape):
    gate, up, dy = (3 * torch.randn(3, *shape, device=triton)).to(dtype).unbind(0)
    test_glu.check(gate, up, dy, act, "triton", test_glu.ACT_ERROR)


def test_rows_apart(triton):
    both = torch.randn(9, 2 * 300, device=triton)
    gate, up = both.chunk(2, -1)
    dy = torch.randn(300, 9, device=triton).mT  # strided elements
    test_glu.check(gate, up, dy, "silu", "apart")
    assert ops.glu(gate, up).is_contiguous()


@pytest.mark.parametrize("act", test_glu.ACTS)
def test_infinities_and_nan(triton, act):
    gate = torch.tensor([float("inf"), float("nan"), 1.0, 50.0, -200.0], device=triton)
    up = torch.tensor([2.0, 1.0, float("nan"), 1.0, 1.0], device=triton)
    y = ops.glu(gate, up, act=act)
    assert y[0] == float("inf") and y[1].isnan() and y[2].isnan()
    assert y[3] == (2500 if act == "relu2" else 50) and y[4].abs() < 1e-30
