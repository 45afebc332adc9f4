"""Fixtures for tests of kernels. `kernel` runs a test on every kernel of its op (on_kernels.py);
`isa`, `triton` and `cuda` run it on the kernels of one language.
"""

import pytest
from cases import OPS
from fuzz_cases import threads
from on_kernels import KERNELS, parametrize, use_kernel

from fastlm import backend

pytest.register_assert_rewrite("contract", "contract_in_place")


def op_of(module) -> str:
    return module.__name__.rpartition("test_")[2]


def pytest_generate_tests(metafunc):
    if (name := op_of(metafunc.module)) in OPS:
        parametrize(metafunc, OPS[name])


@pytest.fixture
def op(request):
    return OPS[op_of(request.module)]


@pytest.fixture
def kernel(request):
    with use_kernel(request.param) as kernel:
        yield kernel


@pytest.fixture(params=backend.cpu_isas())
def isa(request):
    """Run the test on every instruction set of this machine, and on emulated AMX tiles, with two
    threads.
    """
    with backend.use_cpu_isa(request.param), threads(2):
        yield request.param


@pytest.fixture
def triton():
    """Run every op on its Triton kernel. Returns the device for its tensors."""
    with use_kernel(next(k for k in KERNELS if k.language == "triton")) as kernel:
        yield kernel.device


@pytest.fixture(params=[k for k in KERNELS if k.language == "cuda"], ids=lambda k: k.variant)
def cuda(request):
    """Run every op on its CUDA kernel. Returns the device for its tensors. Without a GPU that is
    the CPU, where csrc/simt runs the kernels with their threads in the seed's order. Even seeds
    also look for races in global memory.
    """
    with use_kernel(request.param) as kernel:
        yield kernel.device
