"""Test a sample of triton_gate, for one architecture per op; `make gate` compiles everything."""

import os
import subprocess
import sys

from paths import GATES

SAMPLE = 8  # every eighth combination of an op's cases and dtypes


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(GATES)
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def gate(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "triton_gate", *arguments)


def test_machine_code():
    done = gate("--capability", "90", "--sample", str(SAMPLE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of them with faults" in done.stdout


ANY_LENGTH = """
from collections import defaultdict
from fastlm.kernels import attention
from fastlm.kernels.launch import compile_for
from fastlm.reference import AttentionOptions
from triton_gate import meta

variants, numbers = defaultdict(set), AttentionOptions(True, 1.0)
with compile_for(80) as compiled:
    for queries, keys in ((512, 512), (513, 1030), (1000, 1001)):
        q, k = meta(64, 4, queries, 64), meta(64, 2, keys, 64)
        out, lse = attention.attention_forward(q, k, k, *[None] * 4, numbers)
        attention.attention_backward(
            out, None, q, k, k, out, lse, *[None] * 4, numbers, False
        )
for launch in compiled:
    variants[launch.name].add(id(launch.kernel))
print({name: len(kernels) for name, kernels in variants.items()})
"""


def test_a_new_length_compiles_nothing():
    """Head strides are multiples of the length, which is odd, even and 1 above a multiple of 8."""
    done = python("-c", ANY_LENGTH)
    kernels = "_forward", "_delta", "_dq", "_dkdv"
    assert done.stdout.strip() == str(dict.fromkeys(kernels, 1)), done.stdout + done.stderr
