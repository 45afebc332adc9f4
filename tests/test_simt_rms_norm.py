"""rms_norm's CUDA kernel against float64, on the emulator where there is no GPU."""

import pytest
import torch

from fastlm import ops


# registers of one, two, four vectors a thread and the wide kernel, each with and without vectors
@pytest.mark.parametrize(
    "shape", [(4, 512), (3, 507), (2, 2, 64), (2, 1), (1, 2056), (1, 4097), (2, 9000)], ids=str
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_float64(cuda, dtype, shape, with_residual):
    x = torch.randn(shape, device=cuda).to(dtype)
    residual = torch.randn(shape, device=cuda).to(dtype) if with_residual else None
    weight = torch.randn(shape[-1], device=cuda).to(dtype)
    print(ops.rms_norm(x, weight, residual=residual))
