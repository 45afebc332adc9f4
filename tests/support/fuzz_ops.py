"""Every op as random cases (fuzz_cases.py defines a case): drawn, built from a line, checked."""

import contextlib
import copy
import math
from collections.abc import Callable
from random import Random

import test_attention
import test_cuda_rope_append
import test_layer_norm
import test_paged_append
import test_paged_attention
import test_quantized_linear
import test_varlen_attention
import torch
from attention_cases import assert_kernel_near
from cases import OPS as TABLES
from cases.base import DTYPES, Built, Case, Op, assert_same, given, rows_of, scattered, size, some
from exact import dequantized
from fuzz_cases import another, hold, kernels
from poison import guarded_memory
from tolerance import assert_near
from torch import Tensor

from fastlm import AdamW, _cpu, backend, ops, reference
from fastlm.cuda.paged_attention import SERVES
from fastlm.ops.glu import glu_round
from fastlm.ops.quantized_linear import rounded_linear
from fastlm.ops.rms_norm import rms_norm_round
from fastlm.ops.rope_append import rope_append

SLOW = ("scalar", "amx_emulated")  # 10 to 50 times slower: smaller cases


# ---- attention


def draw_attention(r: Random, isa: str) -> Case:
    hkv, groups = r.choice([1, 1, 2, 3, 8]), r.choice([1, 1, 2, 3, 4, 8, 10])
    d, dv = size(r, 160, 1), size(r, 160, 1)
    b = r.choice([1, 1, 2, 3])
    work = 4e6 if isa in SLOW else 1e8
    while True:
        s, t = r.choice([1, 2, size(r, 300), size(r, 300)]), size(r, 1300)
        if b * hkv * groups * s * t * (t + d + dv) <= work:
            break
    options = given(
        causal=r.random() < 0.5,
        window=some(r, 1, 7, 64, 200),
        softcap=some(r, 3.0, 20.0),
        bias=some(r, "full", "keys", "rows"),
        sinks=r.random() < 0.3,
        alibi=r.random() < 0.3,
        dropout_p=some(r, 0.2),
        scale=some(r, 0.05, -0.3),
    )
    return {"shape": [b, hkv * groups, hkv, s, t, d, dv], "options": options}


def build_attention(case: Case, dtype: torch.dtype) -> Built:
    function, leaves, names = test_attention.case(case["shape"], case["options"], dtype)
    return Built(
        function, leaves, check=lambda: assert_kernel_near(function, leaves, names, "attention")
    )


def draw_varlen(r: Random, isa: str) -> Case:
    hkv, groups = r.choice([1, 2, 3, 8]), r.choice([1, 1, 2, 4])
    work = 2e6 if isa in SLOW else 4e7
    while True:
        lengths = [[size(r, 150), size(r, 400)] for _ in range(r.choice([1, 2, 4, 7]))]
        if r.random() < 0.4:  # self-attention
            lengths = [[s, s] for s, _ in lengths]
        total = sum(t for _, t in lengths)
        if hkv * groups * sum(s for s, _ in lengths) * total * (total + 100) <= work:
            break
    full = max(s for s, _ in lengths) and max(t for _, t in lengths)
    options = given(
        causal=r.random() < 0.6,
        window=some(r, 1, 30, 100),
        softcap=some(r, 4.0),
        bias=bool(full) and r.random() < 0.3,
        sinks=r.random() < 0.3,
        alibi=r.random() < 0.3,
        dropout_p=some(r, 0.3),
    )
    heads, widths = [hkv * groups, hkv], [size(r, 100, 1), size(r, 100, 1)]
    return {"lengths": lengths, "heads": heads, "widths": widths, "options": options}


def build_varlen(case: Case, dtype: torch.dtype) -> Built:
    lengths = tuple(list(x) for x in zip(*case["lengths"]))
    function, leaves, names = test_varlen_attention.case(
        lengths, case["options"], dtype, case["heads"], case["widths"]
    )
    return Built(
        function, leaves, check=lambda: assert_kernel_near(function, leaves, names, "varlen")
    )


def draw_paged(r: Random, isa: str) -> Case:
    hkv, groups = r.choice([1, 2, 3]), r.choice([1, 1, 2, 4, 9])
    most = 300 if isa in SLOW or isa == "simt" else 1500
    widths = [size(r, 130, 1), size(r, 130, 1)]
    if isa == "simt" and r.random() < 0.8:  # the kernels accept no other widths
        step = r.choice([8, 16, 16])
        widths = [-(-n // step) * step for n in widths]
    return {
        "lengths": [size(r, most) for _ in range(r.choice([1, 1, 2, 4]))],
        "page_size": r.choice([1, 3, 7, 16, 32, 256]),
        "queries": r.choice([0, 1, 1, 1, 2, 3, 20, 40]),
        "heads": [hkv * groups, hkv],
        "widths": widths,
        "int8": r.choice([None, "number", "heads"]),
        "options": given(
            causal=r.random() < 0.6,
            window=some(r, 1, 30, 200),
            softcap=some(r, 4.0),
            bias=r.random() < 0.2,
            sinks=r.random() < 0.3,
            alibi_slopes=r.random() < 0.3,
        ),
    }


def build_paged(case: Case, dtype: torch.dtype) -> Built:
    (h, hkv), (d, dv), lengths = case["heads"], case["widths"], case["lengths"]
    q = torch.randn(len(lengths), case["queries"], h, d).to(dtype)
    kind = torch.int8 if case["int8"] else dtype
    cache = test_paged_attention.cache(lengths, case["page_size"], hkv, d, dv, kind)
    options = dict(case["options"])
    if case["int8"]:
        scales = 0.02, 0.03
        options["k_scale"], options["v_scale"] = (
            scales if case["int8"] == "number" else [torch.rand(hkv) * s for s in scales]
        )
    if "bias" in options:
        options["bias"] = torch.randn(case["queries"], max(1, *lengths))
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = torch.rand(h)

    def serving(q, k_cache, v_cache, *_):
        """What the CUDA kernel does not serve runs on the next backend, as where none is forced."""
        left = case.get("isa") == "simt" and not SERVES.holds(q, k_cache, v_cache)
        return backend.use_backend("reference") if left else contextlib.nullcontext()

    def function(*leaves):
        with serving(*leaves):
            return ops.paged_attention(*leaves, **options, return_lse=True)

    def check():
        with serving(q, *cache):
            test_paged_attention.assert_paged_near(q, *cache, what="paged", **options)

    return Built(
        function,
        [q, *cache],
        check=check,
        differentiable=False,
        any_strides=case.get("isa") != "simt",  # other kernels run for other memory layouts
    )


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
    "attention": Op(build_attention, draw_attention, CPU),
    "glu_round": Op(build_glu_round, draw_glu_round, ("cuda",)),
    "layer_norm": Op(build_layer_norm, draw_layer_norm, CPU),
    "matmul": Op(build_matmul, draw_matmul, CPU),
    "paged_append": Op(build_append, draw_append, ("cuda",)),
    "paged_attention": Op(build_paged, draw_paged, BOTH),
    "quantized_linear": Op(build_quantized_linear, draw_quantized_linear, BOTH),
    "rms_norm_round": Op(build_rms_norm_round, draw_rms_norm_round, ("cuda",)),
    "rope_append": Op(build_rope_append, draw_rope_append, ("cuda",)),
    "varlen_attention": Op(build_varlen, draw_varlen, CPU),
}


# Cases with enough work for several threads, of the ops that have no table yet; `op name`.
EVERYTHING = {"causal": True, "window": 300, "softcap": 9.0, "alibi": True, "sinks": True}
QUANTIZED = {"group_size": 64, "symmetric": False, "scale_dtype": "bfloat16", "bias": True}
SPLIT: dict[str, Case] = {
    "layer_norm": {
        "shape": [401, 257], "residual": True, "wide": True, "parameters": [True, True],
        "spread": 1.0, "offset": 0.0, "options": {"eps": 1e-5},
    },
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
