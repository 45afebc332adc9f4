"""No kernel allocates: outputs and workspaces come from Python (count_allocations.cpp counts).

An allocation that fails in a parallel region ends the process; one that fails in Python is an
exception.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What is left to do: a few blocks of each thread and what is packed once a call.
STILL = ("quantized_linear",)
HERE = Path(__file__).resolve().parent
# Cases large enough for parallel regions
COUNT = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from fuzz_cases import OPS, results, run_adamw
from test_threads import CASES
from random import Random
from fastlm import backend
found = ctypes.CDLL(None).allocations_found
found.restype = ctypes.c_long
torch.set_num_threads(2)
report = {}
for name, case in CASES.items():
    op = name.split()[0]
    for isa in backend.cpu_isas():
        if isa == "amx_emulated":  # tiles in memory, 50 times slower
            continue
        for dtype in (torch.float32, torch.bfloat16):
            with backend.use_cpu_isa(isa):
                before = found()
                if OPS[op].build is None:
                    run_adamw(case | {"steps": 1, "threads": 1}, dtype, Random(0))
                else:
                    built = OPS[op].build(case, dtype)
                    results(built, built.leaves, None)
                report[f"{name} {isa} {dtype}"] = found() - before
print(json.dumps(report))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="symbols of glibc")
def test_no_kernel_allocates(tmp_path):
    library = tmp_path / "count_allocations.so"
    source = HERE / "count_allocations.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COUNT, str(HERE)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # the bare matrix core, for tests and benchmarks, packs into vectors: the count is not blind
    probes = [report.pop(name) for name in list(report) if name.startswith("matmul")]
    assert probes and all(probes)
    still = [name for name in report if name.split()[0] in STILL]
    assert all([report.pop(name) for name in still]), "an op of STILL has stopped: take it out"
    assert not (bad := {name: n for name, n in report.items() if n}), bad
