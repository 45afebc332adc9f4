"""quantized_linear's CUDA kernels against float64, on the emulator if there is no GPU.

The bounds are those of test_quantized_linear.py. Its tests of exact integers, outliers, NaN
and strides also run here.
"""

import itertools
from types import SimpleNamespace

import pytest
import test_quantized_linear as on_cpu
import torch
from exact import dequantized
from tolerance import assert_near

from fastlm import backend, ops, reference
from fastlm.cuda import extension, quantized_linear

# vectors: 1, 2 and up to 4 rows; one and several chunks of columns per warp; rows aligned and not
SHAPES = [(1, 20, 64), (2, 9, 2080), (3, 37, 507), (4, 5, 123), (1, 9, 4128)]
# matrices: 8, 16, 32 and 64 rows per block, a ragged last tile; aligned to 16, 4 and 1; more rows
SHAPES += [(5, 64, 123), (9, 67, 1184), (17, 33, 8), (34, 130, 288), (64, 40, 264), (70, 30, 136)]
GROUPS = [8, 16, 32, 40, 128, 520, -1]
FORMS = list(itertools.product(SHAPES, GROUPS))
SCALES = FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASES = list(itertools.product((16, 8), (4, 8), (True, False), FLOATS))


@pytest.fixture(autouse=True)
def _device(cuda):
    with torch.device(cuda):
        yield


@pytest.fixture
def started(monkeypatch):
    """The names of the extension's functions that were called."""
    names = []
    kernels = extension()

    def noting(name):
        return lambda *a: (names.append(name), getattr(kernels, name)(*a))[1]

    names_of = [n for n in dir(kernels) if n.startswith(("quantized_linear", "dequantize"))]
    recorder = SimpleNamespace(**{n: noting(n) for n in names_of})
    monkeypatch.setattr(quantized_linear, "extension", lambda: recorder)
    return names


@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_float64(dtype, bits, act_bits, symmetric):
    case = CASES.index((act_bits, bits, symmetric, dtype))
    for i in range(4 * case, 4 * case + 4):  # 13 is coprime to the number of forms: all occur
        (m, n, k), group_size = FORMS[i * 13 % len(FORMS)]
        scale_dtype = SCALES[i % 3]
        q = on_cpu.weight(n, k, bits, group_size, symmetric, scale_dtype)
        bias = torch.randn(n).to(scale_dtype) if i % 2 else None
        x = torch.randn(m, k).to(dtype)
        on_cpu.check(x, q, bias, act_bits, f"{m, n, k} group {group_size}")


# each kernel with every kind of group: one step, one tile, wider, and with offsets
@pytest.mark.parametrize("m", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 520, -1])
def test_matrix_forms(m, bits, group_size):
    for dtype, act_bits, symmetric in itertools.product(FLOATS[1:], (16, 8), (True, False)):
        if (dtype == torch.float16) == symmetric:
            continue  # skip half of them to save time; test_matches_float64 has both
        q = on_cpu.weight(21, 544, bits, group_size, symmetric)
        x = torch.randn(m - 1, 544).to(dtype)
        on_cpu.check(x, q, None, act_bits, f"{dtype} x of {act_bits} bits, {symmetric=}")


@pytest.mark.parametrize("act_bits", [16, 8])
def test_forms_by_rows(started, act_bits):
    bias = torch.randn(24)
    for group_size, m, k, name in (
        (32, 2, 96, "vector"),
        (32, 3, 96, "matrix" if act_bits == 16 else "vector"),
        (32, 5, 96, "matrix"),
        (40, 5, 96, "matrix" if act_bits == 16 else "vector"),
        (-1, 257, 40, "many" if act_bits == 16 else "matrix"),
    ):
        q = on_cpu.weight(24, k, 4, group_size, symmetric=False)
        x = torch.randn(m, k).bfloat16()
        started.clear()
        ops.quantized_linear(x, q, bias, act_bits=act_bits)
        names = {
            "vector": ["quantized_linear_vector"],
            "matrix": ["quantized_linear_stripe", "quantized_linear_matrix"],
            "many": ["dequantize"],
        }[name]
        rounding = [] if act_bits == 16 else ["quantized_linear_round"]
        assert started == rounding + names, (group_size, m)
    started.clear()
    ops.quantized_linear(torch.randn(5, 96), on_cpu.weight(24, 96, 8), bias, act_bits=act_bits)
    assert ("dequantize" in started) == (act_bits == 16)  # no instruction multiplies float32


# rows of x; a row of tiles of W (n columns of y, k columns), cut into stripes
STRIPES = [
    ((9, 20, 5120), (5, 4)),  # few blocks: 20 tiles in 4 parts
    ((7, 40, 10208), (10, 2)),  # 2 x 20 tiles, the last one of each row is short
    ((40, 300, 4608), (27, 3)),  # 3 x 36 tiles: 27 + 9, 18 + 18, 9 + 27
    ((40, 700, 2304), (27, 2)),  # 6 x 18 tiles: more rows of tiles than blocks
]


@pytest.mark.parametrize(("shape", "wanted"), STRIPES)
def test_stripes(shape, wanted):
    """Parts of y from several blocks, added with the bias. The emulator has 4 multiprocessors."""
    m, n, k = shape
    q = on_cpu.weight(n, k, 4, symmetric=n != 300)
    x = torch.randn(m, k).bfloat16()
    stripe = extension().quantized_linear_stripe
    assert stripe(x, q.qdata, 4, k, 4) == wanted
    whole = stripe(x, q.qdata, 4, k, 1)
    assert whole[1] == 1
    for act_bits in (16, 8):
        on_cpu.check(x, q, torch.randn(n), act_bits, f"{shape}")


def test_stripes_of_any_length():
    """Wherever it is cut, y is the same up to the order of its sums."""
    kernels = extension()
    q = on_cpu.weight(70, 1520, 8)
    x, y = torch.randn(12, 1520).bfloat16(), torch.empty(12, 70)
    weight = (q.qdata, q.scales, None, None, 8, 128, 1520)
    wanted = x.double() @ dequantized(q).t()
    for stripe in range(1, 8):  # 2 x 6 tiles
        parts = torch.full((7, *y.shape), float("nan"))
        y.fill_(float("nan"))
        kernels.quantized_linear_matrix(x, None, None, *weight, y, stripe, parts, 0)
        assert_near(y, wanted.float(), wanted, floor=2**-20, what=f"{stripe}")


@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_by_blocks(started, monkeypatch, dtype, with_bias):
    monkeypatch.setattr(quantized_linear, "FUSED_ROWS", 8)
    monkeypatch.setattr(quantized_linear, "_BLOCK_WEIGHTS", 3000)  # 10 rows of 300 columns
    q = on_cpu.weight(33, 300, 4, 40, symmetric=False)
    bias = torch.randn(33).to(dtype) if with_bias else None
    on_cpu.check(torch.randn(11, 300).to(dtype), q, bias, 16)
    assert started == ["dequantize"] * (4 + 1)  # the last one comes from check


def test_float64_bias():
    q, bias = on_cpu.weight(5, 64, 8), torch.randn(5, dtype=torch.float64)
    x = torch.randn(2, 64)
    assert torch.equal(ops.quantized_linear(x, q, bias), ops.quantized_linear(x, q, bias.float()))


def test_integers_are_exact():
    on_cpu.test_integer_part_is_exact(None)
    on_cpu.test_extreme_codes(None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 4, 8])
def test_every_code_is_exact(bits, m):
    """Each code at each position: rows of a unit matrix times powers of two."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).repeat(9)[: 64 * (bits // 4) * 4]
    codes = torch.stack([codes.roll(i)[:64] for i in range(17)])
    q = on_cpu.QuantizedWeight(
        on_cpu.reference_pack(codes, bits), torch.ones(17, 1), None, bits, 64, (17, 64)
    )
    for dtype in FLOATS:
        for first in range(0, 64, max(m, 7)):  # every position in an octet, every lane and step
            x = torch.eye(64)[first : first + m].to(dtype)
            wanted = codes[:, first : first + m].t().to(dtype)
            assert torch.equal(ops.quantized_linear(x, q), wanted)


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


def test_rounds_as_the_reference(dtype):
    """Equal to the last bit, ties included: the bound of the products excludes other integers."""
    for bits, (group_size, k) in itertools.product(
        (4, 8), ((8, 104), (40, 123), (520, 1100), (-1, 1100))
    ):
        q = on_cpu.weight(1, k, bits, group_size)
        x = torch.randn(5, k).to(dtype)
        x[2] = torch.arange(k) % 255 - 127.0  # absmax 127: halves would be ties
        x[3] = x[2] / 2
        x[3, ::8] = 127
        rounded, scale, sums = quantized_linear.int8_rows(x, q.qdata, q.scales, bits, q.group_size)
        if bits == 4:  # an octet's even columns come first
            octets = torch.cat([rounded, rounded.new_zeros(5, -rounded.shape[1] % 8)], 1)
            rounded = octets.view(5, -1, 2, 4).transpose(2, 3).reshape(5, -1)
        assert not rounded[:, k:].any()
        wanted, wide_scale = reference.round_rows(x, q.group_size)
        assert torch.equal(rounded[:, :k].float(), wanted)
        group, run = torch.arange(k) // q.group_size, torch.arange(k) % q.group_size // 512
        runs = group * -(-min(q.group_size, k) // 512) + run
        assert torch.equal(scale[runs, :5].t(), wide_scale)
        whole = torch.zeros(5, scale.shape[0]).index_add_(1, runs, wanted)
        assert torch.equal(sums[:, :5].t(), whole * scale[:, :5].t())


def test_strides_and_leading_dimensions(dtype):
    on_cpu.test_strided_empty_and_leading_dimensions(None, dtype)
    base = torch.randn(70, 320).to(dtype)
    for x in (base[:8, 3:259], base[:8, 4:260], base[::9, :256], base[:1, 1:257], base[:0, :256]):
        q = on_cpu.weight(18, 256, 4)
        for act_bits in (8, 16):
            on_cpu.check(x, q, None, act_bits, f"{x.storage_offset()} {x.stride()}")


def test_weight_that_is_strided():
    q = on_cpu.weight(12, 64, 4, 16, symmetric=False)
    x = torch.randn(3, 64)
    wanted = ops.quantized_linear(x, q)
    for name in ("qdata", "scales", "zeros"):
        t = getattr(q, name)
        setattr(q, name, torch.cat([t, t], 1)[:, : t.shape[1]])
    assert torch.equal(ops.quantized_linear(x, q), wanted)


@pytest.mark.parametrize("m", [2, 6, 40])
def test_same_bits_on_repeat(m):
    q = on_cpu.weight(33, 1184, 4)
    x = torch.randn(m, 1184).bfloat16()
    for act_bits in (8, 16):
        first, second = (ops.quantized_linear(x, q, act_bits=act_bits) for _ in range(2))
        assert torch.equal(first, second)


def test_dequantize(dtype):
    on_cpu.test_dequantize_on_every_isa(None, dtype)
    for k in (1504, 1501):
        for bits in (4, 8):
            q = on_cpu.weight(3, k, bits)
            with backend.use_backend("reference"):
                wanted = q.dequantize(dtype)
            # without offsets: one product, rounded once
            assert torch.equal(q.dequantize(dtype), wanted)
            assert torch.equal(dequantized(q).to(dtype), wanted)
    assert on_cpu.weight(0, 16, 8).dequantize(dtype).shape == (0, 16)


def test_rounds_weights_as_dequantize_does():
    """With offsets an instruction's operand is w in x's dtype; x with one column shows it."""
    for bits, dtype in itertools.product((4, 8), FLOATS[1:]):
        q = on_cpu.weight(40, 64, bits, 16, symmetric=False, scale_dtype=torch.float32)
        x = torch.eye(64)[:6].to(dtype)
        assert_near(
            ops.quantized_linear(x, q),
            q.dequantize(dtype)[:, :6].t(),
            dequantized(q)[:, :6].t(),
            factor=1,
            floor=2**-16,
        )


def test_refusals():
    q = on_cpu.weight(6, 64, 8, 8)
    kernels, y = extension(), torch.empty(2, 6)
    weight = (q.qdata, q.scales, None, None)
    with pytest.raises(ValueError, match="y: wanted columns 6, got 5"):
        kernels.quantized_linear_vector(
            torch.randn(2, 64), None, *weight, 8, 8, 64, torch.empty(2, 5), 0
        )
    with pytest.raises(ValueError, match="scales: wanted columns 4, got 8"):
        kernels.quantized_linear_vector(torch.randn(2, 64), None, *weight, 8, 16, 64, y, 0)
    with pytest.raises(ValueError, match="bits: wanted 4 or 8, got 3"):
        kernels.quantized_linear_vector(torch.randn(2, 64), None, *weight, 3, 8, 64, y, 0)
    with pytest.raises(ValueError, match="qdata: wanted dtype uint8, got int8"):
        kernels.dequantize(
            q.qdata[:, :32].contiguous(), q.scales, None, 4, 8, y.new_empty(6, 64), 0
        )
    with pytest.raises(
        ValueError, match="zeros: wanted the dtype of scales, bfloat16, got float32"
    ):
        kernels.dequantize(q.qdata, q.scales, q.scales.float(), 8, 8, y.new_empty(6, 64), 0)
    x, scale = torch.zeros(2, 64, dtype=torch.int8), torch.ones(8, 64)
    x64 = torch.randn(2, 64).bfloat16()
    with pytest.raises(ValueError, match="stripe: wanted at least 1, got 0"):
        kernels.quantized_linear_matrix(x64, None, None, *weight, 8, 8, 64, y, 0, None, 0)
    wide = on_cpu.weight(6, 1024, 8)
    args = (torch.randn(2, 1024).bfloat16(), None, None, wide.qdata, wide.scales, None, None)
    with pytest.raises(ValueError, match="parts: wanted matrices 2, got 0"):
        kernels.quantized_linear_matrix(*args, 8, 128, 1024, y, 1, None, 0)
    with pytest.raises(ValueError, match="group_size: wanted a multiple of 32, got 8"):
        kernels.quantized_linear_matrix(x, scale, scale, *weight, 8, 8, 64, y, 1, None, 0)
