"""Every op as random cases (fuzz_cases.py defines a case): drawn, built from a line, checked."""

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator
from random import Random

import test_cuda_rope_append
import test_layer_norm
import test_linear_cross_entropy
import test_linear_distillation
import test_linear_logprobs
import test_paged_append
import test_quantized_linear
import torch
from cases import OPS as TABLES
from cases import losses
from cases.base import DTYPES, Built, Case, Op, assert_same, given, rows_of, scattered, size, some
from exact import dequantized
from fuzz_cases import another, hold, kernels
from poison import guarded_memory
from tolerance import assert_near
from torch import Tensor

from fastlm import AdamW, _cpu, backend, ops, reference
from fastlm.cpu import linear as cpu_linear
from fastlm.ops.glu import glu_round
from fastlm.ops.quantized_linear import rounded_linear
from fastlm.ops.rms_norm import rms_norm_round
from fastlm.ops.rope_append import rope_append

SLOW = ("scalar", "amx_emulated")  # 10 to 50 times slower: smaller cases


# ---- the key-value cache


def draw_append(r: Random, isa: str) -> Case:
    widths = [size(r, 130, 1), size(r, 130, 1)]
    if r.random() < 0.5:
        widths = [-(-n // 16) * 16 for n in widths]
    page_size, per = r.choice([1, 3, 7, 16]), r.choice([1, 2, 5])
    return {
        "shape": [r.choice([0, 1, 2, 5]), size(r, page_size * per), r.choice([1, 2, 3, 9])],
        "widths": widths,
        "pages": [page_size, per],
        "int8": r.random() < 0.5,
        "absent": some(r, 0.3),
        "spread": r.choice([1.0, 10.0]),
    }


def build_append(case: Case, dtype: torch.dtype) -> Built:
    """Equal to the last bit; `check` also shows that memory between heads is left unchanged."""
    int8 = case["int8"]
    (k, v, *caches, table, positions), scales = test_paged_append.case(
        dtype, *case["shape"], *case["widths"], *case["pages"], int8=int8
    )
    k, v = k * case["spread"], v * case["spread"]
    if case["absent"]:
        for t, end in ((table, len(caches[0])), (positions, math.prod(case["pages"]))):
            bad = torch.tensor([-1, end, -(2**31), 2**31 - 1], dtype=torch.int32)
            chosen = torch.rand(t.shape) < case["absent"]
            t[chosen] = bad[torch.randint(0, 4, t.shape)][chosen]

    def function(k, v, k_cache, v_cache, table, positions):
        ops.paged_append(k, v, k_cache, v_cache, table, positions, **scales)
        return k_cache, v_cache

    def check():
        wide = [torch.nn.functional.pad(c, (16, 16), value=7) for c in caches]
        expected = [t.clone() for t in wide]
        for name, (a, b) in (("simt", wide), ("reference", expected)):
            with backend.use_backend(name):
                function(k, v, a[..., 16:-16], b[..., 16:-16], table, positions)
        assert_same(expected, wide, "reference")

    leaves = [k, v, *caches, table, positions]
    return Built(function, leaves, check=check, differentiable=False, written=(2, 3))


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


def draw_layer_norm(r: Random, isa: str) -> Case:
    return {
        "shape": rows_of(r, isa, 1 << 12, 1),
        "residual": r.random() < 0.5,
        "wide": r.random() < 0.5,
        "parameters": [r.random() < 0.7, r.random() < 0.7],
        "spread": r.choice([0.01, 1.0, 100.0]),
        "offset": r.choice([0.0, 0.0, 30.0]),  # in spreads
        "options": {"eps": r.choice([1e-5, 1e-12])},
    }


def build_layer_norm(case: Case, dtype: torch.dtype) -> Built:
    shape, residual, eps = case["shape"], case["residual"], case["options"]["eps"]
    x, weight, bias, r, dy, dh = test_layer_norm.tensors(shape, dtype, case["parameters"], residual)
    x = (x + case["offset"]) * case["spread"]
    if case["wide"]:
        weight, bias = (p if p is None else p.float() for p in (weight, bias))
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": r}
    leaves = {name: t for name, t in leaves.items() if t is not None}

    def function(*tensors):
        return ops.layer_norm(**dict(zip(leaves, tensors)), eps=eps)

    def check():
        test_layer_norm.check(x, weight, bias, r, dy, dh, eps)

    return Built(function, [*leaves.values()], check=check)


def draw_rope_append(r: Random, isa: str) -> Case:
    d = r.choice([8, 16, 22, 64])
    page_size, per = r.choice([1, 5, 8, 16]), 3
    return {
        "shape": [r.choice([1, 2, 3]), r.choice([1, 1, 2, page_size]), r.choice([2, 4, 6])],
        "widths": [d, r.choice([8, 9, d]), r.choice([d, d // 4 * 2])],
        "pages": [page_size, per],
        "absent": some(r, 0.3),
    }


def build_rope_append(case: Case, dtype: torch.dtype) -> Built:
    (b, s, h), (d, dv, turned), (page_size, per) = case["shape"], case["widths"], case["pages"]
    leaves = test_cuda_rope_append.case("cpu", dtype, b, s, h, 2, d, dv, turned, page_size, per)
    leaves = [t.clone(memory_format=torch.contiguous_format) for t in leaves]
    if case["absent"]:
        for t, end in ((leaves[7], len(leaves[5])), (leaves[8], page_size * per)):
            chosen = torch.rand(t.shape) < case["absent"]
            t[chosen] = torch.tensor([-1, end], dtype=torch.int32)[torch.randint(2, t.shape)][
                chosen
            ]

    def function(q, k, v, cos, sin, k_cache, v_cache, table, positions):
        q = rope_append(
            q, k, v, cos.contiguous(), sin.contiguous(), k_cache, v_cache, table.contiguous(),
            positions.contiguous(),
        )  # fmt: skip
        return q, k_cache, v_cache

    def check():
        test_cuda_rope_append.assert_same([t.clone() for t in leaves])

    return Built(function, leaves, check=check, differentiable=False, written=(5, 6))


# ---- matrix products


def draw_quantized_linear(r: Random, isa: str) -> Case:
    work = 2e5 if isa == "simt" else 2e6 if isa in SLOW else 2e7
    while True:
        m, n, k = r.choice([0, 1, 1, 2, 5, size(r, 600)]), size(r, 700, 1), size(r, 3000, 1)
        if m * n * k <= work:
            break
    return {
        "shape": [m, n, k],
        "bits": r.choice([4, 8]),
        "act_bits": r.choice([8, 16]),
        "group_size": r.choice([8, 16, 24, 32, 64, 128, 128, 256, -1]),
        "symmetric": r.random() < 0.6,
        "scale_dtype": r.choice(list(DTYPES)),
        "bias": r.random() < 0.5,
    }


def build_quantized_linear(case: Case, dtype: torch.dtype) -> Built:
    m, n, k = case["shape"]
    q = test_quantized_linear.weight(
        n, k, case["bits"], case["group_size"], case["symmetric"], DTYPES[case["scale_dtype"]]
    )
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias = torch.randn(n).to(dtype) if case["bias"] else None
    on_gpu = case.get("isa") == "simt"  # which has no backward

    def function(x, bias=None):
        bias = None if bias is None else bias.detach()  # its gradient is a sum of torch's
        y = ops.quantized_linear(x, q, bias, act_bits=case["act_bits"])
        return y, q.dequantize(dtype)

    def check():
        if case["act_bits"] == 8:
            test_quantized_linear.check(x, q, bias, 8)
        else:
            y = ops.quantized_linear(x, q, bias)
            near_product(y, x, dequantized(q).T, bias, 2)
        if on_gpu:
            return
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(ops.quantized_linear(leaf, q), leaf, dy)
        near_product(dx, dy, dequantized(q), None, 3)

    def near_product(got, a, b, bias, factor):
        """Compare as test_quantized_linear.check does. Sums of few outputs may all be small, so the
        floor scales with their terms. The worst of 100,000 cases deviates twice as far as the worst
        of a test."""
        truth, plain = a.double() @ b, a @ b.to(a.dtype)
        if bias is not None:
            truth, plain = truth + bias.double(), plain + bias
        apart = 0.0 if q.zeros is None else 2 * q.zeros.double().abs().max()  # q and offset
        terms = (a.double().square() @ (b.abs() + apart).square()).sqrt()
        ratio = (terms.max() / truth.abs().max()).item() if truth.numel() else 0.0
        floor = 2 * test_quantized_linear.sum_floor(dtype, len(b)) * max(1.0, ratio)
        assert_near(got, plain, truth, factor=factor, floor=floor, what="product")

    leaves = [x, *([] if bias is None else [bias])]
    return Built(function, leaves, check=check, differentiable=not on_gpu, any_strides=not on_gpu)


def draw_glu_round(r: Random, isa: str) -> Case:
    return {
        **TABLES["glu"].draw(r, isa),
        "shape": rows_of(r, isa, 1 << 12, 1),
        "bits": r.choice([4, 8]),
        "group_size": r.choice([8, 24, 32, 128, 512, 1024, -1]),
    }


def draw_rms_norm_round(r: Random, isa: str) -> Case:
    return {
        **TABLES["rms_norm"].draw(r, isa),
        "weight": r.choice(["wide", "like x"]),
        "bits": r.choice([4, 8]),
        "group_size": r.choice([8, 24, 32, 128, 512, 1024, -1]),
    }


def rounded_like(case: Case, joined: Callable, plain: Callable, leaves: list[Tensor]) -> Built:
    """`joined` of leaves and a weight: the same bits as the definition's rounding of `plain` of
    them, and the product of that, in any memory order."""
    n, k = 5, case["shape"][-1]
    into = test_quantized_linear.weight(n, k, case["bits"], case["group_size"])
    format = into.bits, into.group_size

    def function(*leaves):
        *rows, h = joined(*leaves, into)
        x, wanted_h = plain(*leaves)
        count = x.numel() // k
        wanted = reference.int8_rows(x, *format)
        cut = [t[:, :count] for t in (*rows[1:], *wanted[1:])]  # undefined behind the last row
        assert_same([wanted[0], *cut[2:]], [rows[0], *cut[:2]], "rounded")
        product = into.qdata, into.scales, into.zeros, None, *format, k, x.dtype
        wanted_y = ops.quantized_linear(x, into, act_bits=8).reshape(count, n)
        assert_same([wanted_y, wanted_h], [rounded_linear(*rows, *product), h], "product")
        return x, h

    return Built(
        function, leaves, check=lambda: function(*leaves), differentiable=False, any_strides=False
    )


def build_glu_round(case: Case, dtype: torch.dtype) -> Built:
    gate, up = (case["spread"] * torch.randn(2, *case["shape"])).to(dtype).unbind(0)
    act, none = case["act"], torch.empty(0)

    def joined(gate, up, into):
        codes = into.qdata, into.scales
        return *glu_round(gate, up, *codes, act, into.bits, into.group_size), none

    def plain(gate, up):
        return ops.glu(gate, up, act=act), none

    return rounded_like(case, joined, plain, [gate.clone(), up.clone()])


def build_rms_norm_round(case: Case, dtype: torch.dtype) -> Built:
    shape, options = case["shape"], case["options"]
    x = torch.randn(shape).to(dtype) * case["spread"]
    residual = [torch.randn(shape).to(dtype)] if case["residual"] else []
    weight = torch.randn(shape[-1]).to(torch.float32 if case["weight"] == "wide" else dtype)

    def joined(x, weight, *rest):
        *residual, into = rest
        format = into.bits, into.group_size
        return rms_norm_round(
            x, *(residual or [None]), weight, into.qdata, into.scales, options["eps"],
            options["offset"], *format,
        )  # fmt: skip

    def plain(x, weight, residual=None):
        y = ops.rms_norm(x, weight, residual=residual, **options)
        return (y, torch.empty(0, dtype=dtype)) if residual is None else y

    return rounded_like(case, joined, plain, [x, weight, *residual])


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


# ---- AdamW


def draw_adamw(r: Random, isa: str) -> Case:
    state = r.choice(["float32", "8 bits", "master", "8 bits, master", "stochastic"])
    long = 10000 if isa == "simt" else 90000
    return {
        "shapes": [
            [size(r, 40, 1), size(r, long // 30)] if r.random() < 0.7 else [size(r, long)]
            for _ in range(r.choice([1, 2, 5]))
        ],
        "state": state,
        "grad_dtype": r.choice(list(DTYPES)),
        "spread": r.choice([1e-6, 1.0, 100.0]),
        "steps": r.choice([1, 2, 4]),
        "options": {
            "lr": r.choice([1e-4, 1e-2]),
            "betas": r.choice([[0.9, 0.999], [0.8, 0.95], [0.0, 0.0]]),
            "eps": r.choice([1e-8, 1e-6]),
            "weight_decay": r.choice([0.0, 0.1]),
            "maximize": r.random() < 0.2,
            "max_grad_norm": some(r, 0.5, 1e6),
        },
    }


def run_adamw(case: Case, dtype: torch.dtype, r: Random) -> None:
    """Check steps against the formula in float64, each from the state after the previous one. Bits
    must be equal on another number of threads, and on strided parameters if nothing depends on the
    order of elements in memory.
    """
    kind, options = case["state"], dict(case["options"])
    if kind == "stochastic" and dtype == torch.float16:
        dtype = torch.bfloat16
    options["betas"] = tuple(options["betas"])
    options |= {"state_bits": 8} if "8 bits" in kind else {}
    options |= {"master_weights": True} if "master" in kind else {}
    options |= {"stochastic_rounding": True} if kind == "stochastic" else {}
    in_any_order = kind in ("float32", "master") and options["max_grad_norm"] is None
    layouts = [Tensor.clone, Tensor.clone]
    layouts += [lambda t: scattered(t, r)] if in_any_order else []
    values = [torch.randn(s).to(dtype) for s in case["shapes"]]
    sides = [[laid(v).requires_grad_() for v in values] for laid in layouts]
    optimizers = [AdamW(side, **options) for side in sides]
    for _ in range(case["steps"]):
        grads = [torch.randn(v.shape) * case["spread"] for v in values]
        grads = [g.to(DTYPES[case["grad_dtype"]]) for g in grads]
        before = copy.deepcopy(([p.detach() for p in sides[0]], state_of(optimizers[0])))
        for i, (side, optimizer) in enumerate(zip(sides, optimizers)):
            for p, g in zip(side, grads):
                p.grad_dtype = None  # a gradient may have another dtype than its parameter
                p.grad = layouts[i](g)
            with another(case, i):
                optimizer.step()
        after = [p.detach() for p in sides[0]], state_of(optimizers[0])
        near_step(before, after, grads, kind, **options)
        for side, optimizer in zip(sides[1:], optimizers[1:]):
            states = state_of(optimizer)
            for i, (a, b) in enumerate(zip(after[0], side)):
                wanted, got = [a, *after[1][i].values()], [b.detach(), *states[i].values()]
                assert_same(wanted, got, "threads")


def state_of(optimizer: AdamW) -> dict[int, dict[str, Tensor]]:
    return optimizer.state_dict()["state"]


def near_step(
    before, after, grads, kind, *, lr, betas, eps, weight_decay, maximize, max_grad_norm, **_
) -> None:
    """Check one step. 8 bits: an error of half a step of the code, with 3 bits of mantissa (the
    root of v: 4) and 16 binades."""
    clip = 1.0
    if max_grad_norm is not None:
        norm = torch.cat([g.double().flatten() for g in grads]).norm().item()
        clip = min(1.0, max_grad_norm / (norm + 1e-6))
    for i, g in enumerate(grads):
        (start, old), (p, new) = ((side[0][i], side[1].get(i, {})) for side in (before, after))
        if not p.numel():
            continue
        assert new["step"] == old.get("step", 0) + 1
        zero = torch.zeros(p.shape)
        m, v = (old.get(name, zero).double() for name in ("exp_avg", "exp_avg_sq"))
        w = old.get("master", start).double()
        g = g.double() * (-clip if maximize else clip)
        terms = betas[0] * m.abs() + (1 - betas[0]) * g.abs()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        t = new["step"].item()
        scale = lr / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        truth = w - (lr * weight_decay * w + scale * m)
        # fp32 from the norm to the step; the terms of m may cancel
        error = 1e-5 * scale * terms + 2**-22 * truth.abs() + 1e-30
        ulp = torch.finfo(p.dtype).eps * truth.abs() + torch.finfo(p.dtype).smallest_normal * 2**-7
        rounding = ulp if kind == "stochastic" else ulp / 2 if p.dtype != torch.float32 else 0
        assert ((p.double() - truth).abs() <= error + rounding).all(), "parameter"
        if "master" in new:
            assert ((new["master"].double() - truth).abs() <= error).all(), "master"
        m_error, v_error = 1e-5 * terms + 1e-38, 1e-5 * v + 1e-38
        if "8 bits" in kind and p.numel() >= 4096:
            top_m, top_v = (blocks(x.abs()) for x in (m, v))
            m_error = torch.maximum(m_error + m.abs() * 2**-4, top_m * 2**-15.6)
            v_error = torch.maximum(v_error + v * 2**-3.9, top_v * 2**-31)
        assert ((new["exp_avg"].double() - m).abs() <= m_error).all(), "exp_avg"
        assert ((new["exp_avg_sq"].double() - v).abs() <= v_error).all(), "exp_avg_sq"


def blocks(x: Tensor) -> Tensor:
    """For each element the maximum of its block of 256 in memory order."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)
    return flat.amax(1, keepdim=True).expand(-1, 256).flatten()[: x.numel()].view(x.shape)


# ---- any op


CPU, BOTH = ("cpu",), ("cpu", "cuda")
OPS = TABLES | {
    "adamw": Op(None, draw_adamw, BOTH),  # run_adamw
    "glu_round": Op(build_glu_round, draw_glu_round, ("cuda",)),
    "layer_norm": Op(build_layer_norm, draw_layer_norm, CPU),
    "linear": Op(build_linear, draw_linear, CPU),
    "linear_cross_entropy": Op(build_linear_cross_entropy, draw_linear_cross_entropy, CPU),
    "linear_logprobs": Op(build_linear_logprobs, draw_linear_logprobs, CPU),
    "linear_distillation": Op(build_linear_distillation, draw_linear_distillation, CPU),
    "matmul": Op(build_matmul, draw_matmul, CPU),
    "paged_append": Op(build_append, draw_append, ("cuda",)),
    "quantized_linear": Op(build_quantized_linear, draw_quantized_linear, BOTH),
    "rms_norm_round": Op(build_rms_norm_round, draw_rms_norm_round, ("cuda",)),
    "rope_append": Op(build_rope_append, draw_rope_append, ("cuda",)),
}


# Cases with enough work for several threads, of the ops that have no table yet; `op name`.
LOSS = {"ignored": 0.3, "ignore_index": -100, "weight": False, "spread": 1.0}
QUANTIZED = {"group_size": 64, "symmetric": False, "scale_dtype": "bfloat16", "bias": True}
SPLIT: dict[str, Case] = {
    "layer_norm": {
        "shape": [401, 257], "residual": True, "wide": True, "parameters": [True, True],
        "spread": 1.0, "offset": 0.0, "options": {"eps": 1e-5},
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
        if op.build is None:
            run_adamw(case, dtype, r)
            memory.check()
        else:
            language = "cuda" if case["isa"] == "simt" else "cpu"
            hold(op.built(case, dtype, language), case, r, memory)
