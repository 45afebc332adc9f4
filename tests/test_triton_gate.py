"""A sample of tests/triton_gate, for one architecture an op; `make gate` compiles everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OPS = sorted(p.stem for p in (TESTS / "triton_gate").glob("*.py") if not p.stem.startswith("__"))
SAMPLE = 5  # every fifth case and dtype


def gate(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(TESTS)
    command = [sys.executable, "-P", "-m", "triton_gate", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("op", OPS)
def test_machine_code(op):
    done = gate("--op", op, "--capability", "90", "--sample", str(SAMPLE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of them at fault" in done.stdout
