"""Any number of threads yields the same bits: ops that have no table of cases, where work is split.

This is by design, not by luck. A task's share is fixed by the shapes, or one thread computes each
result entirely, and partial results are added in the order of the tasks. Where shares do depend on
the number of threads (rows of dx in linear_cross_entropy), a row's sum does not depend on its
share.
"""

import os
import signal
import time
import warnings

import pytest
import torch
from cases.base import assert_same, results
from fuzz_cases import threads
from fuzz_ops import OPS, SPLIT, ops_of, split_cases

import fastlm


@pytest.mark.parametrize("name", SPLIT)
def test_same_bits_on_any_number_of_threads(isa, dtype, name):
    built, first = OPS[name.split()[0]].build(SPLIT[name], dtype), None
    for n in (1, 2, 3, 4, 2):
        with threads(n):
            got = results(built, built.leaves, None)
        first = first or got
        assert_same(first, got, f"{n} threads")


def test_every_op_is_here():
    assert {name.split()[0] for name in split_cases()} == set(ops_of("cpu"))


def test_a_forked_process_computes_with_one_thread():
    """It used to wait for ever for the threads that its parent has and it does not."""
    q = torch.randn(1, 4, 300, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = fastlm.ops.attention(q, q, q)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and fork
            child = os.fork()
        if child == 0:
            same = torch.equal(fastlm.ops.attention(q, q, q), wanted)
            os._exit(0 if same and torch.get_num_threads() == 1 else 1)
        until, (done, status) = time.monotonic() + 60, (0, 0)
        while not done and time.monotonic() < until:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert done and status == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
