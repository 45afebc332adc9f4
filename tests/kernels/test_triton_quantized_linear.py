"""quantized_linear's Triton kernels against float64, interpreted if there is no GPU.

The bounds are those of test_quantized_linear.py. Its tests of exact integers, outliers, NaN
and strides also run here.
"""

import itertools

import pytest
import test_quantized_linear as on_cpu
import torch
from exact import dequantized
from tolerance import assert_near

from fastlm import backend, ops, reference

# every form: 1, 2 and up to 4 rows; whole and partial tiles of 16, 32, 64, 128 rows; parts of K
SHAPES = [(1, 20, 64), (2, 9, 1030), (3, 37, 507), (4, 5, 123), (5, 64, 123), (9, 20, 1160)]
SHAPES += [(17, 33, 1), (34, 30, 252), (70, 70, 136), (130, 5, 100)]
GROUPS = [8, 16, 32, 40, 128, 520, -1]
SCALES = (torch.float32, torch.bfloat16, torch.float16)
_scales = itertools.cycle(SCALES)
_forms = itertools.cycle(itertools.product(SHAPES, GROUPS))


@pytest.fixture(autouse=True)
def _device(triton):
    with torch.device(triton):
        yield


@pytest.fixture
def module(triton):
    from fastlm.kernels import quantized_linear

    return quantized_linear


@pytest.fixture
def launched(module, monkeypatch):
    """The names of the launched kernels."""
    names = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda k, *a, **o: (names.append(k.__name__), launch(k, *a, **o))
    )
    return names


@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_float64(dtype, bits, act_bits, symmetric):
    for i in range(2):
        (m, n, k), group_size = next(_forms)
        scale_dtype = next(_scales)
        for _ in range(10):  # the next test begins elsewhere in the list
            next(_forms)
        q = on_cpu.weight(n, k, bits, group_size, symmetric, scale_dtype)
        bias = torch.randn(n).to(scale_dtype) if i else None
        x = torch.randn(m, k).to(dtype)
        on_cpu.check(x, q, bias, act_bits, f"{m, n, k} group {group_size}")


@pytest.mark.parametrize("act_bits", [16, 8])
def test_forms_by_rows(launched, act_bits):
    q = on_cpu.weight(24, 1160, 4, 32, symmetric=False)
    bias = torch.randn(24)
    main = "_matrix" if act_bits == 16 else "_integers"
    rounding = [] if act_bits == 16 else ["_round"]
    for m, names in ((1, ["_vector"]), (4, ["_vector"]), (5, [main, "_add_parts"]), (66, [main])):
        launched.clear()
        on_cpu.check(torch.randn(m, 1160).bfloat16(), q, bias, act_bits, f"{m} rows")
        # check also dequantizes
        assert [name for name in launched if name != "_dequantize"] == rounding + names


@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_by_blocks(launched, module, monkeypatch, dtype, with_bias):
    monkeypatch.setattr(module, "FUSED_ROWS", 8)
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 3000)  # 10 rows of 300 columns
    q = on_cpu.weight(33, 300, 4, 40, symmetric=False)
    bias = torch.randn(33).to(dtype) if with_bias else None
    on_cpu.check(torch.randn(11, 300).to(dtype), q, bias, 16)
    assert launched == ["_dequantize"] * (4 + 1)  # the last one comes from check


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_backward_matches_float64(module, monkeypatch, dtype, bits, symmetric):
    for (m, n, k), blocks in (((3, 67, 507), 1 << 24), ((9, 5, 2100), 1)):
        monkeypatch.setattr(module, "_BLOCK_WEIGHTS", blocks)
        q = on_cpu.weight(n, k, bits, 40 if symmetric else -1, symmetric)
        x = torch.randn(m, k).to(dtype).requires_grad_()
        bias = torch.randn(n).to(dtype).requires_grad_()
        dy = torch.randn(m, n).to(dtype)
        y = ops.quantized_linear(x, q, bias)
        dx, db = torch.autograd.grad(y, (x, bias), dy)
        naive, truth = dy @ q.dequantize(dtype), dy.double() @ dequantized(q)
        floor = on_cpu.sum_floor(dtype, n)
        assert_near(dx, naive, truth, factor=3, floor=floor, what=f"dx {m, n, k}")
        assert_near(db, dy.sum(0), dy.double().sum(0), factor=3, what="db")


def test_backward_of_nothing():
    for m, n in ((0, 6), (3, 0)):
        q = on_cpu.weight(n, 16, 4, 8)
        x = torch.randn(m, 16, requires_grad=True)
        ops.quantized_linear(x, q).sum().backward()
        assert torch.equal(x.grad, torch.zeros(m, 16))


def test_integers_are_exact():
    on_cpu.test_integer_part_is_exact(None)
    on_cpu.test_extreme_codes(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_and_nan(dtype):
    on_cpu.test_an_outlier_costs_only_its_own_run(None, dtype)
    on_cpu.test_rows_of_zeros_and_nan(None, dtype)


@pytest.mark.parametrize("m", [3, 7])
def test_infinity_stays_in_its_row(dtype, m):
    q = on_cpu.weight(20, 64, 8)
    x = torch.randn(m, 64).to(dtype)
    x[1, 5] = float("inf")
    for act_bits in (8, 16):
        y = ops.quantized_linear(x, q, act_bits=act_bits)
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_rounds_as_the_reference(module, dtype):
    """Equal to the last bit, ties included: the bound of the products excludes other integers."""
    for group_size, k in ((8, 100), (40, 123), (520, 1100), (-1, 1100)):
        q = on_cpu.weight(1, k, 4, group_size)
        x = torch.randn(5, k).to(dtype)
        x[2] = torch.arange(k) % 255 - 127.0  # absmax 127: halves would be ties
        x[3] = x[2] / 2
        x[3, ::8] = 127
        w = module._Weight(q.qdata, q.scales, None, 4, q.group_size, k)
        rounded, scale, _ = module._rounded(x, w)
        wanted, wide_scale = reference.round_rows(x, q.group_size)
        assert torch.equal(rounded.float(), wanted)
        group, run = torch.arange(k) // q.group_size, torch.arange(k) % q.group_size // 512
        runs = group * w.runs_a_group + run
        assert torch.equal(scale[:, runs], wide_scale)


def test_strides_and_leading_dimensions():
    on_cpu.test_strided_empty_and_leading_dimensions(None, torch.bfloat16)


def test_weight_that_is_strided():
    q = on_cpu.weight(12, 64, 4, 16)
    x = torch.randn(3, 64)
    wanted = ops.quantized_linear(x, q)
    for name in ("qdata", "scales"):
        t = getattr(q, name)
        setattr(q, name, torch.cat([t, t], 1)[:, : t.shape[1]])
    assert torch.equal(ops.quantized_linear(x, q), wanted)


@pytest.mark.parametrize("m", [2, 6])
def test_same_bits_on_repeat(m):
    q = on_cpu.weight(33, 1160, 4)
    x = torch.randn(m, 1160)
    for act_bits in (8, 16):
        first, second = (ops.quantized_linear(x, q, act_bits=act_bits) for _ in range(2))
        assert torch.equal(first, second)


def test_dequantize(dtype):
    on_cpu.test_dequantize_on_every_isa(None, dtype)
    q = on_cpu.weight(3, 1500, 4)
    with backend.use_backend("reference"):
        wanted = q.dequantize(dtype)
    assert torch.equal(q.dequantize(dtype), wanted)  # without offsets: one product, rounded once
    assert torch.equal(dequantized(q).to(dtype), wanted)
    assert on_cpu.weight(0, 16, 8).dequantize(dtype).shape == (0, 16)
