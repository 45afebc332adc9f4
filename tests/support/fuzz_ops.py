"""Every op as random cases (fuzz_cases.py defines a case): drawn, built from a line, checked."""

import contextlib
import math
import sys
from collections.abc import Iterator
from random import Random

import test_linear_cross_entropy
import test_linear_distillation
import test_linear_logprobs
import torch
from cases import OPS as TABLES
from cases import losses
from cases.base import DTYPES, Built, Case, Op, given, size, some
from fuzz_cases import hold, kernels
from poison import guarded_memory

from fastlm import _cpu, backend, ops
from fastlm.cpu import linear as cpu_linear

SLOW = ("scalar", "amx_emulated")  # 10 to 50 times slower: smaller cases


# ---- losses


@contextlib.contextmanager
def small_products(allowed: bool) -> Iterator[None]:
    """Set whether small products may use the definition, or use the kernels like all others."""
    module = sys.modules["fastlm.ops.linear_cross_entropy"]
    before, module._SMALL = module._SMALL, module._SMALL if allowed else 0
    try:
        yield
    finally:
        module._SMALL = before


def draw_linear_cross_entropy(r: Random, isa: str) -> Case:
    work = 4e6 if isa in SLOW else 8e7
    while True:
        # not a single class: its gradient is 0, and consists only of terms that cancel
        rows, width, classes = size(r, 1200), size(r, 300, 1), size(r, 6000, 2)
        if rows * width * classes <= work:
            break
    loss = losses.draw(r, classes)
    return {
        "shape": [rows, width, classes],
        "bias": r.random() < 0.5,
        "small": r.random() < 0.3,
        **loss,
    }


def build_linear_cross_entropy(case: Case, dtype: torch.dtype) -> Built:
    rows, width, classes = case["shape"]
    x = torch.randn(rows, width).to(dtype)
    w = (torch.randn(classes, width) * case["spread"] / width**0.5).to(dtype)
    target, weights, options = losses.targets(case, rows, classes)
    options |= {"weight": weights[0]} if weights else {}
    bias = torch.randn(classes).to(dtype) if case["bias"] else None

    small = case.get("small", False)

    def function(x, w, target, bias=None):
        with small_products(small):
            return ops.linear_cross_entropy(x, w, target, linear_bias=bias, **options)

    def check():
        # gradients sum over rows, logits over features, in any order; lse may be small for few rows
        ulps = 2 + ((rows**0.5 + width**0.5) / 2 + 64 / (rows + 4) if dtype == torch.float32 else 0)
        ulps *= 2 if "softcap" in options else 1  # tanh and its slope
        ulps *= 2 if options.get("label_smoothing") else 1  # terms of all classes, which cancel
        ulps *= max(1.0, case["spread"] / 3)  # p has the error of its logit
        with small_products(small):
            test_linear_cross_entropy.check(x, w, bias, target, ulps=ulps, **options)

    leaves = [x, w, target, *([bias] if case["bias"] else [])]
    return Built(function, leaves, check=check, library=small)


def draw_linear_logprobs(r: Random, isa: str) -> Case:
    case = draw_linear_cross_entropy(r, isa)
    options = given(temperature=some(r, 0.3, 2.0), softcap=some(r, 2.0, 30.0))
    kept = ("shape", "bias", "ignored", "ignore_index", "spread")
    return {key: case[key] for key in kept} | {"entropy": r.random() < 0.7, "options": options}


def build_linear_logprobs(case: Case, dtype: torch.dtype) -> Built:
    rows, width, classes = case["shape"]
    x = torch.randn(rows, width).to(dtype)
    w = (torch.randn(classes, width) * case["spread"] / width**0.5).to(dtype)
    target, _, options = losses.targets(case | {"weight": False, "options": {}}, rows, classes)
    options = case["options"] | {"ignore_index": options["ignore_index"]}
    bias = torch.randn(classes).to(dtype) if case["bias"] else None
    entropy = case["entropy"]

    def function(x, w, target, bias=None):
        return ops.linear_logprobs(
            x, w, target, linear_bias=bias, return_entropy=entropy, **options
        )

    def check():
        # as in linear_cross_entropy
        ulps = 2 + ((rows**0.5 + width**0.5) / 2 + 64 / (rows + 4) if dtype == torch.float32 else 0)
        ulps *= 2 if "softcap" in options else 1  # tanh and its slope
        ulps *= max(1.0, case["spread"] / 3 / options.get("temperature", 1.0))
        on = (True, entropy)
        test_linear_logprobs.check(x, w, bias, target, on=on, ulps=ulps, entropy=entropy, **options)

    return Built(function, [x, w, target, *([bias] if case["bias"] else [])], check=check)


def draw_linear_distillation(r: Random, isa: str) -> Case:
    work = 4e6 if isa in SLOW else 8e7
    while True:
        rows, width, teacher, classes = (
            size(r, 1200),
            size(r, 300, 1),
            size(r, 300, 1),
            size(r, 6000, 2),
        )
        if rows * (width + teacher) * classes <= work:
            break
    return {
        "shape": [rows, width, teacher, classes],
        "left_out": r.choice([0.0, 0.0, 0.3, 1.0]),
        "spread": r.choice([0.1, 1.0, 3.0, 20.0]),
        "options": given(
            kind=r.choice(["forward", "reverse", "jsd"]),
            beta=r.choice([0.5, 0.1, 0.9]),
            temperature=r.choice([1.0, 0.5, 3.0]),
            num_items=some(r, 77),
            student_softcap=some(r, 2.0, 30.0),
            teacher_softcap=some(r, 30.0),
        ),
    }


def build_linear_distillation(case: Case, dtype: torch.dtype) -> Built:
    rows, width, teacher, classes = case["shape"]
    tensors = test_linear_distillation.make(
        rows, (width, teacher), classes, dtype, scale=case["spread"]
    )
    mask = torch.rand(rows) >= case["left_out"]

    def function(student, student_weight, teacher, teacher_weight, mask):
        return ops.linear_distillation(
            student, student_weight, teacher, teacher_weight, mask=mask, **case["options"]
        )

    def check():
        # gradients sum over rows, logits over features, in any order
        ulps = 4 + ((rows**0.5 + width**0.5) / 2 if dtype == torch.float32 else 0)
        ulps *= 2 if "student_softcap" in case["options"] else 1  # tanh and its slope
        test_linear_distillation.check(tensors, ulps=ulps, mask=mask, **case["options"])

    return Built(function, [*tensors, mask], check=check)


# ---- row ops


# ---- matrix products


def draw_matmul(r: Random, isa: str) -> Case:
    work = 2e6 if isa in SLOW else 3e7
    while True:
        shape = [size(r, 600, 1), size(r, 600, 1), size(r, 1500, 1)]
        if math.prod(shape) <= work:
            return {"shape": shape}


def build_matmul(case: Case, dtype: torch.dtype) -> Built:
    m, n, k = case["shape"]
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)

    def function(a, b):
        c = torch.empty(m, n)
        _cpu.matmul(a, b, c)
        return c

    def check():
        # fp32 accumulation of k products: relative to the sum of magnitudes
        bound = (a.double().abs() @ b.double().abs().T) * (k + 2) * 2**-24
        assert ((function(a, b).double() - a.double() @ b.double().T).abs() <= bound).all()

    return Built(function, [a, b], check=check, differentiable=False)


def draw_linear(r: Random, isa: str) -> Case:
    work = 1e6 if isa in SLOW else 2e7
    while True:
        shape = [size(r, 3000, 1), size(r, 600, 1), size(r, 1500, 1)]
        if math.prod(shape) <= work:
            return {"shape": shape, "bias": r.random() < 0.5}


def build_linear(case: Case, _: torch.dtype) -> Built:
    """fastlm's own products: bfloat16 whatever the case's dtype, for any number of rows."""
    m, n, k = case["shape"]
    x, weight, dy = (torch.randn(s).bfloat16() for s in ((m, k), (n, k), (m, n)))
    bias = [torch.randn(n).bfloat16()] if case["bias"] else []

    def function(x, weight, dy, bias=None):
        y = cpu_linear.linear_forward(x, weight, bias)
        return y, *cpu_linear.linear_backward(dy, x, weight, bias is not None)

    def check():
        x64, w64, dy64 = x.double(), weight.double(), dy.double()
        terms = [(x64, w64.T, k), (dy64, w64, n), (dy64.T, x64, m)]
        if bias:  # one more product for each sum: y + 1 b, 1 dy
            terms[0] = (
                torch.cat((x64, x64.new_ones(m, 1)), 1),
                torch.cat((w64.T, bias[0].double()[None])),
                k + 1,
            )
            terms.append((x64.new_ones(m), dy64, m))
        for got, (a, b, count) in zip(function(x, weight, dy, *bias), terms):
            truth = a @ b
            # rounded once after float32 sums of `count` products in any order
            bound = truth.abs() * 2**-8 + a.abs() @ b.abs() * (count + 2) * 2**-24
            assert ((got.double() - truth).abs() <= bound).all()

    return Built(function, [x, weight, dy, *bias], check=check, differentiable=False)


# ---- any op


CPU, BOTH = ("cpu",), ("cpu", "cuda")
OPS = TABLES | {
    "linear": Op(build_linear, draw_linear, CPU),
    "linear_cross_entropy": Op(build_linear_cross_entropy, draw_linear_cross_entropy, CPU),
    "linear_logprobs": Op(build_linear_logprobs, draw_linear_logprobs, CPU),
    "linear_distillation": Op(build_linear_distillation, draw_linear_distillation, CPU),
    "matmul": Op(build_matmul, draw_matmul, CPU),
}


# Cases with enough work for several threads, of the ops that have no table yet; `op name`.
LOSS = {"ignored": 0.3, "ignore_index": -100, "weight": False, "spread": 1.0}
SPLIT: dict[str, Case] = {
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
    "matmul": {"shape": [403, 301, 130]},
}  # fmt: skip


def split_cases() -> dict[str, Case]:
    """The cases of all ops with enough work for several threads, by `op name`."""
    return SPLIT | {
        f"{name} {row}": op.rows[row].case
        for name, op in TABLES.items()
        for row in op.rows
        if op.rows[row].split
    }


# Sizes by which host functions divide work, with values that also divide the work of small cases.
HOST = {
    "cross_entropy": {"CROSS_ENTROPY_PART_BYTES": 128},
    "paged_attention": {"PAGED_MIN_TILES": 1},
    "quantized_linear": {"quantized_linear.FUSED_ROWS": 8, "quantized_linear._BLOCK_WEIGHTS": 3000},
    "rope": {"rope._POSITIONS": 0, "rope._HEADS": 3},
}


def ops_of(kernels: str) -> list[str]:
    """The ops that have kernels of this kind."""
    kernels = "cuda" if kernels == "simt" else kernels
    return [name for name, op in OPS.items() if kernels in op.kernels]


def draw(op: str, seed: int, kernels: str = "cpu") -> Case:
    r = Random(f"{op} {seed}")
    isas = [isa for isa in backend.cpu_isas() for _ in range(1 if isa in SLOW else 2)]
    isa = r.choice(isas) if kernels == "cpu" else kernels
    common = {"op": op, "seed": seed, "isa": isa, "threads": r.choice([1, 2, 3, 4])}
    if isa == "simt":
        host = {"emulated_multiprocessors": r.choice([1, 4, 40])}
        host |= HOST.get(op, {}) if r.random() < 0.5 else {}
        common |= {"order": r.randrange(1000), "races": r.random() < 0.3, "host": host}
    return common | {"dtype": r.choice(list(DTYPES))} | OPS[op].draw(r, isa)


def run(case: Case) -> None:
    """Raise if the op is wrong on this case."""
    r, dtype = Random(case["seed"]), DTYPES[case["dtype"]]
    op = OPS[case["op"]]
    with kernels(case), guarded_memory() as memory:
        torch.manual_seed(case["seed"])
        language = "cuda" if case["isa"] == "simt" else "cpu"
        hold(op.built(case, dtype, language), case, r, memory)
