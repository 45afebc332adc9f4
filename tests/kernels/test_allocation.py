"""No kernel allocates: outputs and workspaces come from Python (count_allocations.cpp counts).

An allocation that fails in a parallel region ends the process. One that fails in Python raises an
exception.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from paths import PYTHONPATH, SUPPORT

# The cases are large enough for parallel regions.
COUNT = """
import ctypes, json
import torch
from cases.base import results
from fuzz_ops import OPS, split_cases
import fastlm
from fastlm import backend
from test_decode_step import copy_of, model_of, prefilled
found = ctypes.CDLL(None).allocations_found
found.restype = ctypes.c_long
torch.set_num_threads(2)
report = {}
# one source makes the kernels of all instruction sets: two of them are enough for a case
isas = [isa for isa in backend.cpu_isas() if isa != "amx_emulated"]  # whose tiles are slow
for number, (name, case) in enumerate(split_cases().items()):
    op = name.split()[0]
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        isa = isas[(number + i) % len(isas)]
        with backend.use_cpu_isa(isa):
            before = found()
            call = OPS[op].build(case, dtype)
            results(call, call.leaves, None)
            report[f"{name} {isa} {dtype}"] = found() - before
for format in (None, "w8a16", "w4a8"):
    model = model_of("gemma2")
    if format:
        model = fastlm.quantize(model, format, group_size=16)
    for rows in (1, 5):  # each thread prepares all rows, or they share them
        ids, cache = prefilled(model, rows, 9, 11)
        for isa in backend.cpu_isas():
            with backend.use_cpu_isa(isa), torch.inference_mode():
                steps = copy_of(model, cache)
                steps.logits(ids[:, 9].contiguous())  # makes the workspace
                before = found()
                steps.logits(ids[:, 10].contiguous())
                report[f"decode_step {format} {rows} {isa}"] = found() - before
print(json.dumps(report))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="symbols of glibc")
def test_no_kernel_allocates(tmp_path):
    library = tmp_path / "count_allocations.so"
    source = SUPPORT / "count_allocations.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COUNT],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # the bare matrix core, for tests and benchmarks, packs into vectors: the counter does work
    probes = [report.pop(name) for name in list(report) if name.startswith("matmul")]
    assert probes and all(probes)
    assert any(name.startswith("decode_step") for name in report)
    assert not (bad := {name: n for name, n in report.items() if n}), bad
