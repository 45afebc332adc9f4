"""AdamW on parameters sharded by FSDP2: two processes on the CPU (sharded_adamw.py)."""

import os
import subprocess
import sys

import pytest
from paths import SUPPORT
from sharded_adamw import CASES


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_two_ranks_are_one_process(name):
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("two ranks on the CPU: interpreted kernels only")
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(SUPPORT / "sharded_adamw.py"), name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal:") == len(CASES)
