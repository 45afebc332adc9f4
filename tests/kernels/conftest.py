"""Tests of kernels: on every instruction set of this machine, on Triton's interpreter, and on the
emulator of the CUDA kernels. Where there is a GPU, Triton and CUDA kernels run there.
"""

import importlib
import os

import numpy as np
import pytest
import torch
from poison import guarded_memory

from fastlm import backend

# thread orders in which every test of a CUDA kernel runs if there is no GPU
SIMT_SEEDS = int(os.environ.get("FASTLM_SIMT_SEEDS") or 2)


@pytest.fixture(params=backend.cpu_isas())
def isa(request):
    """Run the test on every instruction set of this machine, and on emulated AMX tiles, with two
    threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with backend.use_cpu_isa(request.param):
        yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def triton():
    """Run every op on its Triton kernel. Returns the device for its tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        with backend.use_backend("triton"):
            yield "cuda"
        return
    from interpreter import repair_bfloat16

    repair_bfloat16()
    # masked-off lanes also compute; numpy warns where a GPU returns inf or NaN
    with backend.use_backend("triton"), np.errstate(all="ignore"), guarded_memory() as memory:
        yield "cpu"
        memory.check()  # nothing was written outside an output


@pytest.fixture(params=range(1, SIMT_SEEDS + 1), ids=lambda seed: f"seed {seed}")
def cuda(request):
    """Run every op on its CUDA kernel. Returns the device for its tensors. Without a GPU that is
    the CPU, where csrc/simt runs the kernels with their threads in the seed's order. Even seeds
    also look for races in global memory.
    """
    if torch.cuda.is_available():
        with backend.use_backend("cuda"):
            yield "cuda"
        return
    with backend.use_backend("simt"), guarded_memory() as memory:
        simt = importlib.import_module("fastlm._simt")
        simt.set_options(seed=request.param, races=request.param % 2 == 0)
        yield "cpu"
        memory.check()  # nothing was written outside an output
