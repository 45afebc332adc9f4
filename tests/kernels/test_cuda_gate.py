"""Tests of the gate that compares the CUDA kernels' machine code with the table."""

import json

import cuda_gate
import pytest

ALL = (80, 90, 100)


@pytest.fixture(
    scope="module", params=[(90,), pytest.param(ALL, marks=pytest.mark.exhaustive)], ids=str
)
def kernels(request):
    """Figures of all architectures; `make gate` and `make test-all` also read all instructions."""
    path = cuda_gate.library_path()
    if path is None:
        pytest.skip("fastlm._cuda is not built: no nvcc here")
    return cuda_gate.read(path, request.param)


@pytest.fixture(scope="module")
def table():
    return json.loads(cuda_gate.TABLE.read_text())


def test_every_kernel_is_as_recorded(kernels, table):
    same_nvcc = cuda_gate.nvcc_version(cuda_gate.library_path()) == table["nvcc"]
    assert cuda_gate.find_faults(kernels, table if same_nvcc else None) == []
    assert cuda_gate.unmatched_patterns(kernels) == []


def test_the_library_has_all_architectures(kernels):
    assert kernels.keys() == {80, 90, 100}
    assert kernels[80].keys() == kernels[90].keys() == kernels[100].keys()
    assert all(len(k.opcodes) > 5 for k in kernels[90].values())


def test_occupancy():
    kernel = cuda_gate.Kernel(64, 0, 0, 256, {})
    assert kernel.warps(90) == 32  # 64 registers x 256 threads: four blocks
    assert kernel._replace(registers=32).warps(90) == 64
    assert kernel._replace(registers=32, shared=40 * 1024).warps(80) == 8 * 4


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"opcodes": {"LDL.64": 1}}, "bytes of stack"),
        ({"opcodes": {"LDG.E": 4}}, "no LDG.E.128, STG.E.128"),
        ({"registers": 255}, "registers 255, on record"),
        ({"shared": 50 * 1024}, "51200 bytes of static shared memory"),
        ({"threads": 1024, "registers": 60}, "warps 32, on record"),
    ],
    ids=str,
)
def test_a_worse_figure_is_a_fault(kernels, table, change, fault):
    name = "rms_norm_kernel<8, 1, __nv_bfloat16, float>"
    good = kernels[90][name]
    assert cuda_gate.find_faults({90: {name: good}}, table) == []
    faults = cuda_gate.find_faults({90: {name: good._replace(**change)}}, table)
    assert any(fault in line for line in faults), faults
