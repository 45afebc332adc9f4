"""quantized_linear's CUDA kernels against float64, on the emulator where there is no GPU.

The bounds are those of tests/test_quantized_linear.py, and its tests of exact integers, outliers,
NaN and strides run here as they are.
"""

import itertools

import pytest
import test_quantized_linear as on_cpu
import torch
from tolerance import assert_near

from fastlm import backend, ops, reference

# every form: 1, 2 and up to 4 rows, one chunk of columns a warp and several; 8, 16, 32 and 64 rows
# a block; more
SHAPES = [(1, 20, 64), (2, 9, 2080), (3, 37, 507), (4, 5, 123), (1, 9, 4104)]
SHAPES += [(5, 64, 123), (9, 67, 1160), (17, 33, 8), (34, 130, 252), (64, 40, 264), (70, 30, 136)]
GROUPS = [8, 16, 32, 40, 128, 520, -1]
SCALES = (torch.float32, torch.bfloat16, torch.float16)
_scales = itertools.cycle(SCALES)
_forms = itertools.cycle(itertools.product(SHAPES, GROUPS))


@pytest.fixture(autouse=True)
def _device(cuda):
    with torch.device(cuda):
        yield


@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_float64(dtype, bits, act_bits, symmetric):
    for i in range(2):
        (m, n, k), group_size = next(_forms)
        scale_dtype = next(_scales)
        for _ in range(10):  # the next test begins at another place of the list
            next(_forms)
        q = on_cpu.weight(n, k, bits, group_size, symmetric, scale_dtype)
        bias = torch.randn(n).to(scale_dtype) if i else None
        x = torch.randn(m, k).to(dtype)
        on_cpu.check(x, q, bias, act_bits, f"{m, n, k} group {group_size}")
