"""SmolLM2, the real model that a package carries: its file against transformers, to the last bit
and in its answers; the effect of 8-bit activations.
"""

import os
import subprocess
import sys

import pytest
from paths import SUPPORT


@pytest.mark.parametrize("check", ["transformers", "answers"])
def test_smollm2(check):
    done = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / "smollm2_check.py"), check],
        env=os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
