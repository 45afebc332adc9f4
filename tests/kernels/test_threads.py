"""Threads: every op has a case whose work is split, which contract.py runs on any number of them;
and a process that forks.
"""

import os
import signal
import time
import warnings

import torch
from fuzz_ops import ops_of, split_cases

import fastlm


def test_every_op_is_here():
    assert {name.split()[0] for name in split_cases()} == set(ops_of("cpu"))


def test_a_forked_process_computes_with_one_thread():
    """A forked process has none of its parent's threads, and must not wait for them."""
    q = torch.randn(1, 4, 300, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = fastlm.ops.attention(q, q, q)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and fork
            child = os.fork()
        if child == 0:
            same = torch.equal(fastlm.ops.attention(q, q, q), expected)
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
