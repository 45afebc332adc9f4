"""Tests of quantized_linear beyond its table of cases (cases/quantized_linear.py)."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import quantized_linear as table
from cases.base import assert_like, check
from contract import *  # noqa: F403
from exact import dequantized
from on_kernels import on
from tolerance import assert_near

from fastlm import InputError, backend, ops, reference
from fastlm.inference.block_manager import BLOCK_SIZE
from fastlm.quant import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
both_act_bits = pytest.mark.parametrize("act_bits", [16, 8])
each_bits = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def _device(request):
    """Make new tensors on the kernel's device."""
    device = request.getfixturevalue("kernel").device if "kernel" in request.fixturenames else "cpu"
    with torch.device(device):
        yield


def weight(n, k, bits, group_size=128, symmetric=True, scale_dtype=torch.bfloat16):
    return ops.quantize_weight(
        torch.randn(n, k), bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )


def packed(codes, bits, group_size):
    """Return a weight of these codes, with scales of 1."""
    n, k = codes.shape
    nibbles = (codes + 8).to(torch.uint8)
    codes = codes.to(torch.int8) if bits == 8 else nibbles[:, 0::2] + 16 * nibbles[:, 1::2]
    return QuantizedWeight(
        codes, torch.ones(n, -(-k // group_size)), None, bits, group_size, (n, k)
    )


def module_of(kernel):
    package = "kernels" if kernel.language == "triton" else "cuda"
    return importlib.import_module(f"fastlm.{package}.quantized_linear")


@pytest.fixture
def started(kernel, monkeypatch):
    """Record the names of the launched kernels, or of the extension's functions."""
    names, module = [], module_of(kernel)
    if kernel.language == "triton":
        launch = module.launch
        monkeypatch.setattr(
            module, "launch", lambda k, *a, **o: (names.append(k.__name__), launch(k, *a, **o))
        )
        return names
    extension = module.extension()

    def noting(name):
        return lambda *a: (names.append(name), getattr(extension, name)(*a))[1]

    functions = [n for n in dir(extension) if n.startswith(("quantized_linear", "dequantize"))]
    recorder = SimpleNamespace(**{n: noting(n) for n in functions})
    monkeypatch.setattr(module, "extension", lambda: recorder)
    return names


@on("triton")
@both_act_bits
def test_triton_forms_by_rows(kernel, started, act_bits):
    q, bias = weight(24, 1160, 4, 32, symmetric=False), torch.randn(24)
    main = "_matrix" if act_bits == 16 else "_integers"
    rounding = [] if act_bits == 16 else ["_round"]
    for m, names in ((1, ["_vector"]), (4, ["_vector"]), (5, [main, "_add_parts"]), (66, [main])):
        started.clear()
        ops.quantized_linear(torch.randn(m, 1160).bfloat16(), q, bias, act_bits=act_bits)
        assert started == rounding + names


@on("cuda")
@both_act_bits
def test_cuda_forms_by_rows(kernel, started, act_bits):
    bias = torch.randn(24)
    vector, many = ["quantized_linear_vector"], ["dequantize"]
    matrix = ["quantized_linear_stripe", "quantized_linear_matrix"]
    for group_size, m, k, names in (
        (32, 2, 96, vector),
        (32, 3, 96, matrix if act_bits == 16 else vector),
        (32, 5, 96, matrix),
        (40, 5, 96, matrix if act_bits == 16 else vector),
        (-1, 257, 40, many if act_bits == 16 else matrix),
    ):
        q = weight(24, k, 4, group_size, symmetric=False)
        x = torch.randn(m, k).bfloat16()
        started.clear()
        ops.quantized_linear(x, q, bias, act_bits=act_bits)
        rounding = [] if act_bits == 16 else ["quantized_linear_round"]
        assert started == rounding + names, (group_size, m)
    started.clear()
    ops.quantized_linear(torch.randn(5, 96), weight(24, 96, 8), bias, act_bits=act_bits)
    assert ("dequantize" in started) == (act_bits == 16)  # no instruction multiplies float32


@on("triton", "cuda")
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_by_blocks(op, kernel, started, monkeypatch, dtype, bias):
    """Also of Triton's backward, by blocks of columns."""
    module = module_of(kernel)
    monkeypatch.setattr(module, "FUSED_ROWS", 8)
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 3000)
    for k, blocks in ((300, 4), (2100, 33)):  # 10 rows of W at a time, or 1
        case = table.case(11, 33, k, group_size=40, bias=bias)
        call = op.build_for(case, dtype, kernel.language, kernel.device)
        started.clear()
        check(call)
        name = "_dequantize" if kernel.language == "triton" else "dequantize"
        backward = 3 if k == 2100 else 1
        assert started == [name] * (blocks + 1 + (backward if call.differentiable else 0))


@on("cuda")
@each_bits
@pytest.mark.parametrize("m", [7, 15, 31, 63])
@pytest.mark.parametrize("group_size", [32, 64, 128, 520, -1])
def test_matrix_forms(op, kernel, m, bits, group_size):
    """8, 16, 32 and 64 rows a block with every kind of group: one step, one tile, wider, none."""
    for act_bits in (16, 8):
        for dtype, symmetric in ((torch.bfloat16, True), (torch.float16, False)):
            case = table.case(
                m, 21, 544, bits=bits, act_bits=act_bits, group_size=group_size, symmetric=symmetric
            )
            check(op.build_for(case, dtype, kernel.language, kernel.device))


# rows of x; a row of tiles of W (n columns of y, k columns), cut into stripes
STRIPES = [
    ((9, 20, 5120), (5, 4)),  # few blocks: 20 tiles in 4 parts
    ((7, 40, 10208), (10, 2)),  # 2 x 20 tiles, the last one of each row is short
    ((40, 300, 4608), (27, 3)),  # 3 x 36 tiles: 27 + 9, 18 + 18, 9 + 27
    ((40, 700, 2304), (27, 2)),  # 6 x 18 tiles: more rows of tiles than blocks
]


@on("cuda")
@pytest.mark.parametrize(("shape", "stripe"), STRIPES)
def test_stripes(op, kernel, shape, stripe):
    """Parts of y from several blocks, added with the bias. The emulator has 4 multiprocessors."""
    stripe_of, (_, n, k) = module_of(kernel).extension().quantized_linear_stripe, shape
    for act_bits in (16, 8):
        case = table.case(*shape, act_bits=act_bits, group_size=128, symmetric=n != 300)
        call = op.build_for(case, torch.bfloat16, "cuda", kernel.device)
        x, qdata = call.leaves[:2]
        assert stripe_of(x, qdata, 4, k, 4) == stripe and stripe_of(x, qdata, 4, k, 1)[1] == 1
        check(call)


@on("cuda")
def test_stripes_of_any_length(kernel):
    """Wherever it is cut, y is the same up to the order of its sums."""
    kernels = module_of(kernel).extension()
    q = weight(70, 1520, 8)
    x, y = torch.randn(12, 1520).bfloat16(), torch.empty(12, 70)
    of = (q.qdata, q.scales, None, None, 8, 128, 1520)
    truth = x.double() @ dequantized(q).t()
    for stripe in range(1, 8):  # 2 x 6 tiles
        parts = torch.full((7, *y.shape), float("nan"))
        y.fill_(float("nan"))
        kernels.quantized_linear_matrix(x, None, None, *of, y, stripe, parts, 0)
        assert_near(y, truth.float(), truth, floor=2**-20, label=f"{stripe}")


@both_act_bits
def test_another_layout_of_the_weight(kernel, act_bits):
    q, x = weight(12, 64, 4, 16, symmetric=False), torch.randn(3, 64)
    if kernel.language == "cpu":
        apart = [t.t().contiguous().t() for t in (q.qdata, q.scales, q.zeros)]
        apart = QuantizedWeight(*apart, 4, 16, (12, 64))
        with pytest.raises(ValueError, match="qdata: expected a contiguous tensor"):
            ops.quantized_linear(x, apart, act_bits=act_bits)
        return
    y = ops.quantized_linear(x, q, act_bits=act_bits)
    for name in ("qdata", "scales", "zeros"):
        t = getattr(q, name)
        setattr(q, name, torch.cat([t, t], 1)[:, : t.shape[1]])
    assert torch.equal(ops.quantized_linear(x, q, act_bits=act_bits), y)


def test_bias_of_float64(kernel):
    q, bias, x = weight(5, 64, 8), torch.randn(5, dtype=torch.float64), torch.randn(2, 64)
    assert torch.equal(ops.quantized_linear(x, q, bias), ops.quantized_linear(x, q, bias.float()))


def test_leading_dimensions(kernel, dtype):
    q, x = weight(24, 48, 8, 16), torch.randn(2, 3, 48).to(dtype)
    flat = ops.quantized_linear(x.view(6, 48), q)
    assert torch.equal(ops.quantized_linear(x, q).view(6, 24), flat)
    assert ops.quantized_linear(x, weight(0, 48, 4)).shape == (2, 3, 0)


@on("cpu")
@both_act_bits
def test_blocks_have_the_same_bits_in_every_product(kernel, dtype, act_bits):
    """So the engine is batch-invariant, which multiplies whole blocks of its cache together."""
    assert backend.cpu_extension.BF16_TILE_ROWS <= BLOCK_SIZE
    x = torch.randn(8 * BLOCK_SIZE, 256).to(dtype)
    for bits, group_size, symmetric in (
        (4, 32, False), (4, 64, True), (4, 128, True), (8, 32, True), (8, 128, False),
    ):  # fmt: skip
        q = weight(70, 256, bits, group_size, symmetric)
        alone = ops.quantized_linear(x[:BLOCK_SIZE], q, act_bits=act_bits)
        for blocks in (2, 3, 8):
            y = ops.quantized_linear(x[: blocks * BLOCK_SIZE], q, act_bits=act_bits)
            assert torch.equal(y[:BLOCK_SIZE], alone), (bits, group_size, blocks)


@on("cuda")
def test_rows_between_16_bytes(kernel, dtype):
    base = torch.randn(70, 320).to(dtype)
    for x in (base[:8, 3:259], base[:8, 4:260], base[::9, :256], base[:1, 1:257], base[:0, :256]):
        for act_bits in (8, 16):
            q = weight(18, 256, 4)
            actual, expected = (
                ops.quantized_linear(t, q, act_bits=act_bits) for t in (x, x.clone())
            )
            assert_like([expected], [actual], "views")


def test_int8_activations_are_near_the_unrounded_product(kernel, dtype):
    """Uniform rounding of Gaussian rows at absmax / 127: the absmax of 512 is near 3.1 sigma and
    the noise is step^2 / 12, so 10 log10(12 * 127^2 / 3.1^2) = 43 dB. 38 leaves room for the
    largest of the rows' maxima.
    """
    q = weight(64, 512, 4)
    x = torch.randn(40, 512).to(dtype)
    truth = F.linear(x.double(), dequantized(q))
    noise = ops.quantized_linear(x, q, act_bits=8).double() - truth
    assert 10 * torch.log10(truth.square().sum() / noise.square().sum()) > 38


@each_bits
@pytest.mark.parametrize("m", [1, 40])
def test_integer_part_is_exact(kernel, bits, m):
    """Scales are 1, integer runs of 32 have absmax 127: every product and sum is an integer below
    2^24.
    """
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (33, 130))
    x = torch.randint(-127, 128, (m, 130))
    x[:, ::32] = 127
    y = ops.quantized_linear(x.float(), packed(codes, bits, 32), act_bits=8)
    # every scale is 127 / 127 = 1
    assert torch.equal(y.double(), x.double() @ codes.t().double())


@each_bits
@both_act_bits
@pytest.mark.parametrize("m", [1, 40])
def test_extreme_codes(kernel, bits, act_bits, m):
    """-128 and the ends of int4 times 127, where saturating instructions would fail."""
    codes = torch.full((17, 128), -(2 ** (bits - 1)))
    for sign in (1, -1):
        x = torch.full((m, 128), 127.0 * sign)
        y = ops.quantized_linear(x, packed(codes, bits, 128), act_bits=act_bits)
        assert torch.equal(y, x @ codes.t().float())


@both_act_bits
@each_bits
@pytest.mark.parametrize("m", [1, 6, 40])
def test_offsets_have_a_dtype_of_their_own(kernel, dtype, act_bits, bits, m):
    """As in a GGUF file: scales of 16 bits, and offsets that only float32 holds."""
    q = weight(40, 96, bits, 32, symmetric=False, scale_dtype=torch.float32)
    narrow = replace(q, scales=q.scales.half())
    same = replace(q, scales=q.scales.half().float())
    x = torch.randn(m, 96).to(dtype)
    results = (ops.quantized_linear(x, w, act_bits=act_bits) for w in (narrow, same))
    assert torch.equal(*results)
    assert torch.equal(narrow.dequantize(dtype), same.dequantize(dtype))


@on("cpu", "cuda")
@each_bits
@pytest.mark.parametrize("m", [1, 4, 8])
def test_every_code_is_exact(kernel, dtype, bits, m):
    """Each code at each position: rows of a unit matrix."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).repeat(9)[: 64 * (bits // 4) * 4]
    codes = torch.stack([codes.roll(i)[:64] for i in range(17)])
    q = packed(codes, bits, 64)
    for first in range(0, 64, max(m, 7)):  # every position in an octet, every lane and step
        x = torch.eye(64)[first : first + m].to(dtype)
        assert torch.equal(ops.quantized_linear(x, q), codes[:, first : first + m].t().to(dtype))


@pytest.mark.parametrize(("k", "group_size", "outlier_columns"), [(256, 32, 32), (1536, -1, 512)])
@pytest.mark.parametrize("m", [2, 40])
def test_an_outlier_costs_only_its_own_run(kernel, dtype, k, group_size, outlier_columns, m):
    """With one scale per row the others would be 127 / 1000 of a step each, i.e. zero."""
    q = weight(30, k, 8, group_size)
    x = torch.rand(m, k).to(dtype) + 1
    x[:, 0] = 1000
    codes = q.qdata.clone().index_fill_(1, torch.arange(outlier_columns), 0)
    rest = QuantizedWeight(codes, q.scales, None, 8, q.group_size, (30, k))
    truth = F.linear(x.double(), dequantized(rest))
    noise = ops.quantized_linear(x, rest, act_bits=8).double() - truth
    assert noise.square().sum() / truth.square().sum() < 1e-3


@both_act_bits
@pytest.mark.parametrize("m", [4, 30])
def test_rows_of_zeros_nan_and_infinity(kernel, dtype, act_bits, m):
    x = torch.randn(m, 64).to(dtype)
    x[0], x[1, 5], x[2, 7] = 0, float("nan"), float("inf")
    y = ops.quantized_linear(x, weight(20, 64, 8), act_bits=act_bits)
    assert (y[0] == 0).all() and y[1].isnan().all()
    assert not y[2].isfinite().any() and y[3].isfinite().all()


@on("triton")
def test_triton_rounds_as_the_reference(kernel, dtype):
    """Equal to the last bit, ties included: the bound of the products excludes other integers."""
    for group_size, k in ((8, 100), (40, 123), (520, 1100), (-1, 1100)):
        q = weight(1, k, 4, group_size)
        x = rows_with_ties(k, dtype)
        w = module_of(kernel)._Weight(q.qdata, q.scales, None, 4, q.group_size, k)
        rounded, scale, _ = module_of(kernel)._round_rows(x, w)
        expected, wide_scale = reference.round_rows(x, q.group_size)
        assert torch.equal(rounded.float(), expected)
        group, run = torch.arange(k) // q.group_size, torch.arange(k) % q.group_size // 512
        assert torch.equal(scale[:, group * w.runs_per_group + run], wide_scale)


@on("cuda")
@each_bits
def test_cuda_rounds_as_the_reference(kernel, dtype, bits):
    """As above; also the order of columns, and zeros behind the last one."""
    for group_size, k in ((8, 104), (40, 123), (520, 1100), (-1, 1100)):
        q = weight(1, k, bits, group_size)
        x = rows_with_ties(k, dtype)
        actual = module_of(kernel).int8_rows(x, q.qdata, q.scales, bits, q.group_size)
        expected = reference.int8_rows(x, bits, q.group_size)
        assert [t.shape for t in actual] == [t.shape for t in expected]
        assert torch.equal(actual[0], expected[0])
        for a, b in zip(actual[1:], expected[1:]):  # columns are padded
            assert torch.equal(a[:, :5], b[:, :5])


def rows_with_ties(k, dtype):
    x = torch.randn(5, k).to(dtype)
    x[2] = torch.arange(k) % 255 - 127.0  # absmax 127: halves would be ties
    x[3] = x[2] / 2
    x[3, ::8] = 127
    return x


@each_bits
def test_dequantize_rounds_once(kernel, dtype, bits):
    """Without offsets: one product."""
    for k in (1504, 1501):
        q = weight(3, k, bits)
        assert torch.equal(q.dequantize(dtype), dequantized(q).to(dtype))
    assert weight(0, 16, bits, 8).dequantize(dtype).shape == (0, 16)


@on("cuda")
@each_bits
def test_rounds_weights_as_dequantize_does(kernel, bits):
    """With offsets an instruction's operand is w in x's dtype; x with one column shows it."""
    for dtype in FLOATS[1:]:
        q = weight(40, 64, bits, 16, symmetric=False, scale_dtype=torch.float32)
        x = torch.eye(64)[:6].to(dtype)
        assert_near(
            ops.quantized_linear(x, q),
            q.dequantize(dtype)[:, :6].t(),
            dequantized(q)[:, :6].t(),
            factor=1,
            floor=2**-16,
        )


def test_opcheck_of_int8_activations_and_of_batches():
    q, bias = weight(12, 40, 4, 16), torch.randn(12, requires_grad=True)
    codes = q.qdata, q.scales, q.zeros
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.fastlm.quantized_linear, (x, *codes, bias, 4, 16, 8))
    torch.library.opcheck(
        torch.ops.fastlm.quantized_linear_backward, (torch.randn(2, 3, 12), *codes, 4, 16, 40)
    )
    torch.library.opcheck(torch.ops.fastlm.dequantize, (*codes, 4, 16, 40, torch.bfloat16))


def test_refusals():
    q, x = weight(6, 16, 8, 8), torch.randn(2, 16)
    with pytest.raises(InputError, match=r"x: expected shape \(..., 16\) .*got \(2, 17\)"):
        ops.quantized_linear(torch.randn(2, 17), q)
    with pytest.raises(InputError, match=r"x: expected a float dtype, got torch\.int64"):
        ops.quantized_linear(torch.ones(2, 16, dtype=torch.int64), q)
    with pytest.raises(InputError, match="act_bits: expected 8 or 16, got 4"):
        ops.quantized_linear(x, q, act_bits=4)
    with pytest.raises(
        InputError, match=r"bias: expected a float tensor \(6,\) on cpu, got .*\(5,\)"
    ):
        ops.quantized_linear(x, q, torch.randn(5))
    with pytest.raises(ValueError, match=r"workspace: expected bytes more: [1-9].* got 0"):
        # 40 rows need one; the op allocates it
        args = (q.qdata, q.scales, None, None, 8, 8, 16, 0)
        backend.cpu_extension.quantized_linear(torch.randn(40, 16), *args, torch.empty(40, 6), None)
    with pytest.raises(InputError, match="qweight: expected a QuantizedWeight, got Tensor"):
        ops.quantized_linear(x, torch.randn(6, 16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_below_the_scales_dtype_are_refused(bits, symmetric):
    """They would be zeros without a word. Rows of zeros are none."""
    w = torch.randn(3, 64)
    w[0], w[1] = 0, 1e-8
    options = {"group_size": 32, "symmetric": symmetric}
    with pytest.raises(InputError, match=r"scale_dtype: .* of weights of 1e-08, got"):
        ops.quantize_weight(w, bits, scale_dtype=torch.float16, **options)
    w[1] = 1e-42  # zero to the kernels
    ops.quantize_weight(w, bits, scale_dtype=torch.float16, **options)
    w[1] = 1e-8
    ops.quantize_weight(w, bits, **options)


@on("cuda")
def test_the_extension_refuses(kernel):
    q = weight(6, 64, 8, 8)
    kernels, y = module_of(kernel).extension(), torch.empty(2, 6)
    of = (q.qdata, q.scales, None, None)
    with pytest.raises(ValueError, match="y: expected columns 6, got 5"):
        kernels.quantized_linear_vector(
            torch.randn(2, 64), None, *of, 8, 8, 64, torch.empty(2, 5), 0
        )
    with pytest.raises(ValueError, match="scales: expected columns 4, got 8"):
        kernels.quantized_linear_vector(torch.randn(2, 64), None, *of, 8, 16, 64, y, 0)
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 3"):
        kernels.quantized_linear_vector(torch.randn(2, 64), None, *of, 3, 8, 64, y, 0)
    with pytest.raises(ValueError, match="qdata: expected dtype uint8, got int8"):
        kernels.dequantize(
            q.qdata[:, :32].contiguous(), q.scales, None, 4, 8, y.new_empty(6, 64), 0
        )
    with pytest.raises(
        ValueError, match="zeros: expected the dtype of scales, bfloat16, got float32"
    ):
        kernels.dequantize(q.qdata, q.scales, q.scales.float(), 8, 8, y.new_empty(6, 64), 0)
    x, scale = torch.zeros(2, 64, dtype=torch.int8), torch.ones(8, 64)
    x64 = torch.randn(2, 64).bfloat16()
    with pytest.raises(ValueError, match="stripe: expected at least 1, got 0"):
        kernels.quantized_linear_matrix(x64, None, None, *of, 8, 8, 64, y, 0, None, 0)
    wide = weight(6, 1024, 8)
    args = (torch.randn(2, 1024).bfloat16(), None, None, wide.qdata, wide.scales, None, None)
    with pytest.raises(ValueError, match="parts: expected matrices 2, got 0"):
        kernels.quantized_linear_matrix(*args, 8, 128, 1024, y, 1, None, 0)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 32, got 8"):
        kernels.quantized_linear_matrix(x, scale, scale, *of, 8, 8, 64, y, 1, None, 0)
