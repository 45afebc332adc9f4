"""Fixtures for all tests: poisoned memory, the instruction sets of this machine, seeds."""

import pytest
import torch
from poison import patched, poisoned

from fastlm import backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """An output that a kernel leaves unwritten is seen."""
    with patched(poisoned):
        yield


@pytest.fixture(params=backend.cpu_isas())
def isa(request):
    """Runs the test on every instruction set that this machine has, and on emulated AMX tiles."""
    with backend.use_cpu_isa(request.param):
        yield request.param


@pytest.fixture(params=FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param
