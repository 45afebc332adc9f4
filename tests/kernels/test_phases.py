"""The phases of a decode step (csrc/cpu/base/phases.h): more threads than cores, one asleep."""

import shutil
import subprocess

import pytest
from paths import ROOT, SUPPORT


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitize", [[], ["-fsanitize=thread"]], ids=["plain", "tsan"])
def test_each_unit_once_and_the_same_results(tmp_path, sanitize):
    program = tmp_path / "phases"
    source = ["-I", ROOT / "csrc", SUPPORT / "phases.cpp", "-o", program]
    build = subprocess.run(
        ["g++", "-std=c++17", "-O2", "-pthread", *sanitize, *source], capture_output=True, text=True
    )
    if sanitize and "tsan" in build.stderr:
        pytest.skip("this g++ comes without ThreadSanitizer")
    assert build.returncode == 0, build.stderr
    results = {}
    for threads in (1, 2, 3, 4, 7):
        done = subprocess.run(
            [program, str(threads), "3000"], capture_output=True, text=True, timeout=60
        )
        if sanitize and "unexpected memory mapping" in done.stderr:
            pytest.skip("this ThreadSanitizer does not run in this kernel's address layout")
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
        results[threads] = done.stdout
    assert len(set(results.values())) == 1
