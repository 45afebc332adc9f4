"""Any number of threads yields the same bits: every op, forward and backward, where work is split.

This is by design, not by luck. A task's share is fixed by the shapes, or one thread computes each
result entirely, and partial results are added in the order of the tasks. Where shares do depend on
the number of threads (rows of dx in linear_cross_entropy), a row's sum does not depend on its
share.
"""

import os
import signal
import time
import warnings
from random import Random

import pytest
import torch
from fuzz_cases import assert_same, results, threads
from fuzz_ops import OPS, ops_of, run_adamw

import fastlm

LOSS = {"ignored": 0.3, "ignore_index": -100, "weight": False, "spread": 1.0}
EVERYTHING = {"causal": True, "window": 300, "softcap": 9.0, "alibi": True, "sinks": True}
QUANTIZED = {"group_size": 64, "symmetric": False, "scale_dtype": "bfloat16", "bias": True}
CASES = {
    "attention": {"shape": [2, 4, 2, 200, 300, 64, 40], "options": {"causal": True}},
    "attention spans": {"shape": [1, 2, 1, 150, 1300, 32, 32], "options": {"bias": "full"}},
    "attention heads": {"shape": [3, 6, 3, 140, 140, 33, 33], "options": {"bias": "keys"}},
    "attention options": {
        "shape": [2, 4, 4, 130, 260, 48, 48],
        "options": EVERYTHING | {"bias": "rows", "dropout_p": 0.2},
    },
    "attention decode": {"shape": [2, 6, 3, 1, 2100, 64, 64], "options": {"sinks": True}},
    "varlen_attention": {
        "lengths": [[100, 260], [0, 5], [130, 130], [7, 600]],
        "heads": [6, 2],
        "widths": [40, 24],
        "options": EVERYTHING | {"bias": True},
    },
    "paged_attention": {
        "lengths": [700, 3, 1500], "page_size": 16, "queries": 1, "heads": [8, 2],
        "widths": [64, 64], "int8": None, "options": {"causal": True},
    },
    "paged_attention int8": {
        "lengths": [700, 3, 1500], "page_size": 7, "queries": 2, "heads": [8, 2],
        "widths": [64, 48], "int8": "heads", "options": {"causal": True},
    },
    "paged_attention prefill": {
        "lengths": [300, 40], "page_size": 16, "queries": 130, "heads": [4, 2], "widths": [32, 32],
        "int8": "number", "options": {"causal": True, "sinks": True},
    },
    "cross_entropy": {"shape": [67, 3001], **LOSS, "options": {"z_loss": 0.1, "return_lse": True}},
    "cross_entropy smoothed": {
        "shape": [67, 3001], **LOSS, "options": {"label_smoothing": 0.1, "softcap": 9.0},
    },
    "linear": {"shape": [1500, 130, 71], "bias": True},
    "linear_cross_entropy": {"shape": [151, 71, 900], "bias": True, **LOSS, "options": {}},
    "linear_cross_entropy recomputed": {
        "shape": [151, 71, 900], "bias": True, **LOSS, "options": {"reduction": "none"},
    },
    "linear_cross_entropy smoothed": {
        "shape": [97, 2, 900], "bias": True, **LOSS, "weight": True,
        "options": {"label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.1, "return_lse": True},
    },
    "linear_cross_entropy chunks": {"shape": [1100, 20, 300], "bias": True, **LOSS, "options": {}},
    "linear_logprobs": {
        "shape": [151, 71, 900], "bias": True, **LOSS, "entropy": True,
        "options": {"softcap": 9.0, "temperature": 0.7},
    },
    **{
        f"linear_distillation {kind}": {
            "shape": [151, 71, 40, 900], "left_out": 0.3, "spread": 1.0, "options": {"kind": kind},
        }
        for kind in ("forward", "reverse", "jsd")
    },
    "linear_distillation chunks": {
        "shape": [1100, 20, 12, 300], "left_out": 0.0, "spread": 1.0,
        "options": {"kind": "jsd", "student_softcap": 2.0},
    },
    "glu": {"shape": [301, 257], "act": "silu", "spread": 3.0},
    "glu gelu": {"shape": [301, 257], "act": "gelu", "spread": 3.0},
    "glu gelu_tanh": {"shape": [3, 101, 257], "act": "gelu_tanh", "spread": 3.0},
    "rms_norm": {
        "shape": [401, 257], "residual": True, "wide_weight": True, "spread": 1.0,
        "options": {"eps": 1e-6, "offset": 1.0},
    },
    "layer_norm": {
        "shape": [401, 257], "residual": True, "wide": True, "parameters": [True, True],
        "spread": 1.0, "offset": 0.0, "options": {"eps": 1e-5},
    },
    "rope": {
        "shape": [2, 8, 2, 150], "widths": [64, 64], "interleaved": False, "tables": 3,
        "table_dtype": "float32",
    },
    "rope interleaved": {
        "shape": [2, 8, 2, 150], "widths": [66, 32], "interleaved": True, "tables": 2,
        "table_dtype": "bfloat16",
    },
    "matmul": {"shape": [403, 301, 130]},
    **{
        f"quantized_linear w{bits}a{act} {m}": {
            "shape": [m, 517, 648], "bits": bits, "act_bits": act, **QUANTIZED,
        }
        for bits in (4, 8)
        for act in (8, 16)
        for m in (1, 5, 150)
    },
    **{
        f"adamw {state}": {
            "shapes": [[300, 257], [70001], [9]], "state": state, "grad_dtype": "float32",
            "spread": 1.0, "steps": 2,
            "options": {
                "lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1,
                "maximize": False, "max_grad_norm": 1.0,
            },
        }
        for state in ("float32", "8 bits", "master", "8 bits, master", "stochastic")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_any_number_of_threads(isa, dtype, name):
    case, op = CASES[name], name.split()[0]
    build = OPS[op].build
    if build is None:
        for n in (1, 2, 3):  # compares n threads with n + 1
            run_adamw(case | {"threads": n}, dtype, Random(0))
        return
    built = build(case, dtype)
    first = None
    for n in (1, 2, 3, 4, 2):
        with threads(n):
            got = results(built, built.leaves, None)
        first = first or got
        assert_same(first, got, f"{n} threads")


def test_every_op_is_here():
    assert {name.split()[0] for name in CASES} == set(ops_of("cpu"))


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
