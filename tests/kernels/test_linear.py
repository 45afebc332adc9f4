"""Tests of linear beyond its table of cases (cases/linear.py), and torch's products where
fastlm's own do not run.
"""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases.linear import FP16, fastlm_products
from compiled import assert_compiles_once
from contract import *  # noqa: F403
from tolerance import assert_near
from torch.autograd import forward_ad

from fastlm import InputError, backend, ops
from fastlm.cpu import linear as cpu
from fastlm.ops.glu import ACTIVATIONS

SHAPES = [  # rows, K, N
    (1, 1, 1),
    (7, 32, 16),
    (65, 80, 130),
    (513, 67, 29),  # more than one block of rows, odd widths
    (1030, 48, 33),  # more than one chunk of the weight gradient
    (40, 1100, 70),  # sums of more than one block of k
]
module = sys.modules["fastlm.ops.linear"]


@pytest.fixture
def fastlm_product():
    """Use fastlm's products for any number of rows with gradients, on every instruction set."""
    with fastlm_products((1, math.inf)):
        yield


def inputs(rows, k, n, bias=True):
    x, weight, b, dy = (torch.randn(s).bfloat16() for s in ((rows, k), (n, k), (n,), (rows, n)))
    return x, weight / k**0.5, b if bias else None, dy


def run(function, x, weight, bias, dy):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    learnable = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, learnable, dy)]


def test_fastlms_product_ran(fastlm_product, kernel, monkeypatch):
    calls = []
    for name in ("linear_forward", "linear_input_gradient", "linear_weight_gradient"):
        real = getattr(backend.cpu_extension, name)
        spy = lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]  # noqa: E731
        monkeypatch.setattr(backend.cpu_extension, name, spy)
    run(ops.linear, *inputs(9, 16, 8))
    assert calls == ["linear_forward", "linear_input_gradient", "linear_weight_gradient"]
    calls.clear()
    x, weight, bias, dy = inputs(9, 16, 8)
    ops.linear(x, weight.requires_grad_(), bias).backward(dy)  # no gradient of x is computed
    assert calls == ["linear_forward", "linear_weight_gradient"] and x.grad is None


def test_outputs_past_the_caches_are_the_same_bits(fastlm_product, kernel):
    """Whole cache lines of a large output, ragged columns, and a y that begins within a line."""
    rows, k, n = 1100, 40, 992
    x, weight, bias, _ = inputs(rows, k, n)
    few = torch.cat([ops.linear(part.requires_grad_(), weight, bias) for part in x.split(100)])
    assert torch.equal(ops.linear(x.detach().requires_grad_(), weight, bias), few)
    memory = torch.full((rows * n + 8,), math.nan).bfloat16()  # poisoned, y not aligned to a line
    y = memory[4:-4].view(rows, n)
    backend.cpu_extension.linear_forward(x.detach(), weight, bias, y, cpu._workspace(rows, n, k))
    assert torch.equal(y, few) and memory[:4].isnan().all() and memory[-4:].isnan().all()


@pytest.fixture(params=[name for name in backend.cpu_isas() if name.startswith("amx")])
def tiles(request):
    with backend.use_cpu_isa(request.param):
        yield


@pytest.mark.parametrize("shape", [*SHAPES, (130, 32, 16), (65, 700, 40)], ids=str)
def test_split_float32_is_near_float32(tiles, monkeypatch, shape):
    """2^-18 from each number's two parts and 2^-18 from the product left out, in any shape."""
    monkeypatch.setattr(module, "_MIN_SPLIT_ROWS", 1)
    rows, k, n = shape
    x, weight, bias = torch.randn(rows, k + 3)[:, 3:], torch.randn(n, k), torch.randn(n)
    truth = F.linear(x.double(), weight.double(), bias.double())
    bound = 3 * 2**-18 * (x.abs().double() @ weight.abs().double().mT) + 2**-20 * truth.abs()
    with torch.inference_mode(), module.split_float32():
        y = ops.linear(x, weight, bias)
        assert not torch.equal(y, F.linear(x, weight, bias))
        assert ((y - truth).abs() <= bound + 2**-22).all()
        high = x.bfloat16().float(), weight.bfloat16().float()
        if k <= 80:  # nothing is left over: sums of float32
            assert_near(ops.linear(*high), F.linear(*high), F.linear(*(t.double() for t in high)))


def test_split_float32_is_the_same_bits_on_two_threads(tiles):
    x, weight = torch.randn(1030, 96), torch.randn(70, 96)
    with torch.inference_mode(), module.split_float32():
        expected = ops.linear(x, weight)
        parts = torch.cat([ops.linear(part, weight) for part in x.split(515)])
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert torch.equal(ops.linear(x, weight), expected)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(expected, parts)


def test_split_float32_only_where_it_says(tiles):
    x, weight = torch.randn(300, 24), torch.randn(8, 24)
    with module.split_float32():
        assert torch.equal(ops.linear(x, weight), F.linear(x, weight))  # gradients are on
        with torch.no_grad():
            assert module.uses_split_float32(x, weight) and not module.uses_split_float32(
                x[:255], weight
            )
            assert not module.uses_split_float32(x.double(), weight.double())
            with backend.use_cpu_isa("scalar"):
                assert not module.uses_split_float32(x, weight)
            with backend.use_backend("reference"):
                assert not module.uses_split_float32(x, weight)
    with torch.no_grad():
        assert not module.uses_split_float32(x, weight)
    y, workspace = torch.empty(300, 8), torch.empty(0)
    with backend.use_cpu_isa("scalar"), pytest.raises(ValueError, match="expected tiles"):
        backend.cpu_extension.linear_split(x, weight, None, y, workspace)
    with pytest.raises(ValueError, match="workspace"):
        backend.cpu_extension.linear_split(x, weight, None, y, workspace)


def test_other_dtypes_are_torchs(kernel):
    for rows, dtype in ((1100, torch.float32), (1100, torch.float16)):
        x, w, b = torch.randn(rows, 40), torch.randn(24, 40), torch.randn(24)
        x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
        assert torch.equal(ops.linear(x, w, b), F.linear(x, w, b))
        x.requires_grad_()
        node = ops.linear(x, w, b).grad_fn
        assert node is not None and type(node).__name__ == "AddmmBackward0"


def test_empty(fastlm_product):
    for rows, k, n in ((0, 8, 4), (3, 8, 0), (3, 0, 4)):
        x, weight, bias, dy = (
            torch.empty(rows, k),
            torch.empty(n, k),
            torch.ones(n),
            torch.ones(rows, n),
        )
        y, dx, dw, db = run(ops.linear, *(t.bfloat16() for t in (x, weight, bias, dy)))
        assert y.shape == (rows, n) and dx.shape == (rows, k)
        assert dw.shape == (n, k) and db.shape == (n,)
        assert (y == 1).all() and (db == rows).all()


def test_nan_and_infinity_stay_in_their_rows(fastlm_product, kernel):
    x, w, _, _ = inputs(64, 32, 16, bias=False)
    w.requires_grad_()
    clean = ops.linear(x, w)
    x[5, 3], x[9, 0] = float("nan"), float("inf")
    y = ops.linear(x, w)
    assert y[5].isnan().all() and not y[9].isfinite().any()
    rest = [i for i in range(64) if i not in (5, 9)]
    assert torch.equal(y[rest], clean[rest])


@pytest.fixture(params=[i for i in FP16 if not backend.cpu_extension.unavailable_reason(i)])
def fp16(request):
    with backend.use_cpu_isa(request.param):
        yield


def assert_as_exact_as_rounding(product, a, b):
    """Assert that a product (M, N) of a (M, K) and b (K, N) is as near as one that is rounded."""
    truth = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    ours, naive = (((t.double() - truth).abs() / size).max() for t in (product, truth.bfloat16()))
    assert ours <= 2 * naive


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 1, 1)], ids=str)
def test_fp16_products_of_rows_and_columns_of_any_size(fp16, shape):
    """Rows and columns have sizes of their own, far outside fp16's range."""
    rows, k, n = shape
    x, weight, _, dy = inputs(*shape, bias=False)

    def sized(t, *size):
        return t * (2.0 ** torch.randint(-40, 41, size)).bfloat16()

    huge, tiny = 2.0**110, 2.0**-110
    assert_as_exact_as_rounding(
        cpu.linear_forward(x * huge, weight * tiny, None), x * huge, weight.T * tiny
    )
    assert_as_exact_as_rounding(
        cpu.linear_forward(x * tiny, weight * huge, None), x * tiny, weight.T * huge
    )
    a, b = sized(x, rows, 1), sized(weight, n, 1)
    assert_as_exact_as_rounding(cpu.linear_forward(a, b, None), a, b.T)
    a, b = sized(dy, rows, 1), sized(weight, 1, k)
    assert_as_exact_as_rounding(cpu.linear_backward(a, None, b, False)[0], a, b)
    a, b = sized(dy, 1, n), sized(x, 1, k)
    assert_as_exact_as_rounding(cpu.linear_backward(a, b, None, False)[1], a.T, b)


def test_fp16_products_beside_an_outlier(fp16):
    """What is 2^-18 of its row's largest number counts in full."""
    x, weight, _, _ = inputs(37, 96, 40, bias=False)
    x[:, 5], weight[:, 5] = 2.0**18, 0
    assert_as_exact_as_rounding(cpu.linear_forward(x, weight, None), x, weight.T)
    weight[7] = 0
    assert not cpu.linear_forward(x, weight, None)[:, 7].any()


def test_runs_where_it_is_faster(kernel, monkeypatch):
    """With and without a gradient, only from the number of rows in `_MIN_ROWS` on."""
    calls = []
    extension, real = backend.cpu_extension, backend.cpu_extension.linear_forward
    monkeypatch.setattr(extension, "linear_forward", lambda *a: (calls.append(1), real(*a))[1])
    for learns, min_rows in zip(
        (True, False), module._MIN_ROWS.get(kernel.variant, (math.inf, math.inf))
    ):
        for rows in {1, 40, 70, 1030}:
            x, weight, bias, _ = inputs(rows, 16, 8)
            calls.clear()
            ops.linear(x, weight.requires_grad_(learns), bias)
            assert bool(calls) == (rows >= min_rows), (rows, learns)
            calls.clear()
            ops.linear(x.float(), weight.detach().float(), bias.float())
            assert not calls


def test_follows_autocast():
    x, w, b = torch.randn(1100, 24), torch.randn(8, 24), torch.randn(8)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, w, b)
        assert y.dtype == torch.bfloat16 and ops.linear(x, w).dtype == torch.bfloat16
        assert_near(y, F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))
        y.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


def test_opcheck(fastlm_product):  # not the contract's: while a mode records, products are torch's
    x, w, b, dy = inputs(6, 32, 8)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    torch.library.opcheck(torch.ops.fastlm.linear.default, leaves)
    for given_ in ((x, None, False), (None, w, True), (x, w, True)):
        args = [t.detach() if isinstance(t, torch.Tensor) else t for t in (dy, *given_)]
        torch.library.opcheck(torch.ops.fastlm.linear_backward.default, args)


def test_gradcheck_of_the_reference():
    wide = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (3, 7), (3,))
    ]
    with backend.use_backend("reference"):
        assert torch.autograd.gradcheck(torch.ops.fastlm.linear.default, wide)
        for act in ACTIVATIONS:
            assert torch.autograd.gradcheck(partial(ops.linear, act=act), wide), act


def test_compiles_without_break_or_recompile():  # in a graph products are torch's
    calls = []
    for rows in (1030, 1100, 2050):
        x, w, _, _ = inputs(rows, 32, 16)
        calls.append((x.requires_grad_(), w.requires_grad_()))
    assert_compiles_once(lambda x, w: ops.linear(x, w), calls)
    assert_compiles_once(lambda x, w: ops.linear(x, w, act="silu"), calls)


@pytest.mark.parametrize("act", [None, "silu"])
def test_leading_dimensions(fastlm_product, kernel, act):
    x, w, b, _ = inputs(24, 32, 16)
    w.requires_grad_()
    flat, deep = ops.linear(x, w, b, act=act), ops.linear(x.view(4, 3, 2, 32), w, b, act=act)
    assert deep.shape == (4, 3, 2, 16) and torch.equal(deep.flatten(0, 2), flat)


def test_onednn_serves_where_no_gradient_is_needed(monkeypatch):
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a[3:]) or real(*a)
    )
    x, w, b, _ = (t.float() for t in inputs(37, 33, 45))
    ops.linear(x, w, b, act="gelu_tanh")
    assert calls == [("gelu", [], "tanh")]
    ops.linear(x, w, b, act="relu2")  # oneDNN has none
    ops.linear(x.clone().requires_grad_(), w, b, act="gelu")
    assert len(calls) == 1


def test_refusals():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    with pytest.raises(
        InputError, match=r"weight: expected \(N, K\), K = .* \(2, 8\), got \(3, 7\)"
    ):
        ops.linear(x, w[:, :7])
    with pytest.raises(InputError, match=r"weight: expected torch.float32 .* got torch.bfloat16"):
        ops.linear(x, w.bfloat16())
    with pytest.raises(InputError, match=r"bias: expected shape \(3,\), .* got \(2,\)"):
        ops.linear(x, w, torch.randn(2))
    with pytest.raises(InputError, match="act: expected one of silu, gelu_tanh, gelu, relu2, got"):
        ops.linear(x, w, act="tanh")
    with pytest.raises(InputError, match="weight: expected"):
        ops.linear(x, w[:, :7], act="silu")


def test_defaults_of_torch_do_not_reach_the_workspace(fastlm_product):
    case = inputs(20, 24, 8)
    expected = run(ops.linear, *case)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            results = run(ops.linear, *case)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_keeps_only_what_the_backward_needs(fastlm_product):
    x, w, b, dy = inputs(20, 24, 8)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    for learns, expected in (((w,), [x]), ((x,), [w]), ((x, w, b), [x, w])):
        leaves = [t.detach().requires_grad_(any(t is leaf for leaf in learns)) for t in (x, w, b)]
        saved.clear()
        with hooks:
            y = ops.linear(*leaves)
        assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]
        y.backward(dy)


def test_without_a_gradient_and_under_transforms_it_is_torchs(fastlm_product):
    x, w, b, _ = inputs(20, 24, 8)
    assert torch.equal(ops.linear(x, w, b), F.linear(x, w, b))
    w.requires_grad_()
    ours, theirs = (
        torch.func.vmap(lambda row, f=f: f(row, w, b))(x) for f in (ops.linear, F.linear)
    )
    assert torch.equal(ours, theirs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ours, theirs = (
            forward_ad.unpack_dual(f(dual, w, b)).tangent for f in (ops.linear, F.linear)
        )
    assert ours is not None and torch.equal(ours, theirs)


def test_triton_leaves_products_to_torch(fastlm_product, triton):
    tensors = [None if t is None else t.to(triton) for t in inputs(65, 80, 130)]
    mine, torchs = run(ops.linear, *tensors), run(F.linear, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, torchs, strict=True))
