"""Tests that kernels read and write numbers below 2^-126 as zero: denormals have no slow path.

On such a number an instruction takes 10 cycles (here) to 150. Moments of weights without gradient
decay into denormals, and so does the tail of a softmax. Kernels therefore flush them (simd.h,
FlushDenormals). This is shown here from outside: the bits are the same as for inputs without
denormals, no result is a denormal, and the caller's own arithmetic keeps them.
"""

import time

import pytest
import torch
from cases.base import assert_same, results
from fuzz_cases import threads
from fuzz_ops import OPS, split_cases

from fastlm import AdamW, _cpu, backend, ops

CASES = split_cases()
TINY = 2.0**-126  # the smallest normal float32 and bfloat16


def without_denormals(t):
    if not t.is_floating_point() or t.dtype == torch.float16:  # fp16's are normal in float32
        return t
    return torch.where(t.abs() < TINY, torch.zeros_like(t), t)


@pytest.mark.parametrize("name", CASES)
# not on emulated tiles, which are slow: real ones treat denormals as zero, the rest is as avx512
@pytest.mark.parametrize("isa_name", [i for i in backend.cpu_isas() if i != "amx_emulated"])
def test_denormals_are_zero(isa_name, name):
    """Half of every float input is at 2^-130."""
    with backend.use_cpu_isa(isa_name):
        check_denormals_are_zero(name)


def check_denormals_are_zero(name):
    for dtype in (torch.float32, torch.bfloat16):
        call = OPS[name.split()[0]].build(CASES[name], dtype)
        for i, leaf in enumerate(call.leaves):
            if not leaf.is_floating_point():
                continue
            leaves = [t.clone() for t in call.leaves]
            leaves[i] = torch.where(torch.rand(leaf.shape) < 0.5, leaf * 2.0**-130, leaf)
            actual = results(call, [t.clone() for t in leaves])
            leaves[i] = without_denormals(leaves[i])
            expected = results(call, leaves)
            expected = [t.where(t != 0, 0) for t in expected]  # without the sign, as below
            assert_same(expected, [without_denormals(t) for t in actual], f"leaf {i} {dtype}")


def run_once(name):
    call = OPS[name.split()[0]].build(CASES[name], torch.float32)
    results(call, call.leaves)


@pytest.mark.parametrize("name", CASES)
def test_the_caller_keeps_its_denormals(isa, name):
    """They are kept on every thread, also on those that OpenMP starts; so is a choice to flush."""
    with threads(4):
        run_once(name)
        assert _cpu.threads_that_flush() == 0
    with threads(1):  # threads that OpenMP started now would always flush like this one
        torch.set_flush_denormal(True)
        try:
            run_once(name)
            assert _cpu.threads_that_flush() == 1
        finally:
            torch.set_flush_denormal(False)


def test_adamw_state_decays_to_zero(isa):
    """Weights without gradient, like the unseen rows of an embedding: m halves each step. In torch
    it stays at 1e-45.
    """
    for options in ({}, {"state_bits": 8}):
        p = torch.ones(5000).requires_grad_()
        opt = AdamW([p], betas=(0.5, 0.5), **options)
        for i in range(200):
            p.grad = torch.full_like(p, 1.0 if i == 0 else 0.0)
            opt.step()
        state = opt.state_dict()["state"][0]
        for name in ("exp_avg", "exp_avg_sq"):
            assert (without_denormals(state[name]) == state[name]).all()
        assert p.isfinite().all() and (state["exp_avg"] == 0).all()


def tails(function, *leaves):
    """Return forward and backward as one call."""
    leaves = [t.requires_grad_() for t in leaves]

    def call():
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def steps(m, v, g, **options):
    p = torch.ones(1 << 17).requires_grad_()
    opt = AdamW([p], **options)
    p.grad = torch.full_like(p, g)
    opt.step()
    state = opt.state_dict()
    state["state"][0]["exp_avg"].fill_(m)
    state["state"][0]["exp_avg_sq"].fill_(v)
    opt.load_state_dict(state)
    return opt.step


def slow_ones():
    """name: (a call on normal numbers, the same call on or into denormals)"""
    x = torch.randn(64, 1024)
    small, w = x * 2.0**-130, torch.randn(1024)
    far = torch.full((64, 1024), -90.0)
    far[:, 0] = 0
    first = torch.zeros(64, dtype=torch.int64)
    q = torch.randn(1, 4, 128, 64)
    far_bias = torch.full((128, 128), -88.0)
    far_bias[:, 0] = 0
    weight = ops.quantize_weight(torch.randn(512, 1024), 4)
    with torch.no_grad():
        weight_rows = x[:2], small[:2]
    cases = {
        "rms_norm": [tails(lambda x: ops.rms_norm(x, w), t.clone()) for t in (x, small)],
        "layer_norm": [tails(lambda x: ops.layer_norm(x, w, w), t.clone()) for t in (x, small)],
        "glu": [tails(ops.glu, x.clone(), t.clone()) for t in (x, small)],
        "glu gate": [tails(ops.glu, t.clone(), x.clone()) for t in (x, small)],
        "glu tail": [tails(ops.glu, t.clone(), x.clone()) for t in (x, x - 95)],
        "cross_entropy": [
            tails(lambda z: ops.cross_entropy(z, first), t.clone()) for t in (x, far)
        ],
        "attention": [
            tails(lambda q, k, v, b=b: ops.attention(q, k, v, bias=b), q * 0, q + 0, q + 0)
            for b in (torch.zeros(128, 128), far_bias)
        ],
        "quantized_linear": [
            lambda t=t: ops.quantized_linear(t, weight) for t in weight_rows
        ],
        "adamw m": [steps(m, 1e-6, 0.0) for m in (1e-3, 1e-40)],
        "adamw v": [steps(1e-3, v, 0.0) for v in (1e-6, 1e-41)],
        "adamw g": [steps(1e-3, 1e-6, g) for g in (1e-3, 1e-41)],
        "adamw 8 bits": [steps(1e-3, v, 0.0, state_bits=8) for v in (1e-6, 1e-41)],
    }  # fmt: skip
    return cases


@pytest.mark.parametrize("name", [i for i in backend.cpu_isas() if i != "amx_emulated"])
def test_denormals_cost_nothing(name):
    """Without flushing these took 2 to 4 times as long on the machine where they were written."""
    with backend.use_cpu_isa(name), threads(1):
        for label, pair in slow_ones().items():
            best = [float("inf")] * 2
            for _ in range(15):
                for i, call in enumerate(pair):
                    start = time.thread_time()
                    call()
                    best[i] = min(best[i], time.thread_time() - start)
            assert best[1] < 1.7 * best[0], f"{label}: {best[1] * 1e6:.0f} us, {best[0] * 1e6:.0f}"
