"""quantized_linear on every instruction set against the dequantized weight in float64.

16-bit activations follow the usual rule: the error is at most twice that of plain torch on the
dequantized weight in the same dtype. For 8-bit activations the rounding of x is part of the
definition. So the truth is float64 on the rounded rows, and what remains is one rounding per group
and one of the result.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from exact import dequantized
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops, reference
from fastlm.quant import QuantizedWeight

# (M, N, K): ragged in every direction; one, a few and many rows (dot form, panel form, two blocks
# of rows)
SHAPES = [(1, 20, 64), (3, 67, 507), (5, 64, 123), (9, 70, 252), (34, 33, 1), (2, 1, 1030)]
# two blocks of k; enough rows for each thread to have its own
SHAPES += [(40, 130, 600), (257, 5, 130), (14, 37, 1630), (300, 40, 1100)]
GROUPS = [16, 32, 40, 128, 520, -1]


def weight(n, k, bits, group_size=128, symmetric=True, scale_dtype=torch.bfloat16):
    return ops.quantize_weight(
        torch.randn(n, k),
        bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )


def sum_floor(dtype, k):
    """Half an ulp of the result. In float32 the order of k additions matters: a random walk of k
    roundings.
    """
    return ULP[dtype] * (max(1.0, k**0.5 / 4) if dtype == torch.float32 else 1.0)


def check(x, q, bias, act_bits, what=""):
    actual = ops.quantized_linear(x, q, bias, act_bits=act_bits)
    w64, b64 = dequantized(q), None if bias is None else bias.double()
    if act_bits == 16:
        truth = F.linear(x.double(), w64, b64)
        naive = F.linear(x, q.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
        assert_near(actual, naive, truth, floor=sum_floor(x.dtype, x.shape[1]), what=what)
        return
    rounded, scale = reference.round_rows(x, q.group_size)
    truth = F.linear(rounded.double() * scale.double(), w64, b64)
    # exact integers per group; then, in float32, one product and one sum per group, and the
    # rounding of the result
    groups = q.scales.shape[1] + x.shape[1] // reference.RUN_MAX
    terms = F.linear((rounded * scale).abs().double(), w64.abs()) + (
        0 if bias is None else b64.abs()
    )
    if q.zeros is not None:
        # q and the offset are summed separately and may cancel
        magnitude = dequantized(q).abs().amax() + q.zeros.double().abs().amax() * 2
        terms = terms + (rounded * scale).abs().double().sum(-1, keepdim=True) * magnitude
    bound = terms * (groups + 4) * ULP[torch.float32] + truth.abs() * ULP[x.dtype]
    bound += torch.finfo(x.dtype).tiny * ULP[x.dtype]  # subnormal results
    assert ((actual.double() - truth).abs() <= bound).all(), what


@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_float64(isa, dtype, bits, act_bits, symmetric):
    scale_dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for (m, n, k), group_size in itertools.product(SHAPES, GROUPS):
        q = weight(n, k, bits, group_size, symmetric, next(scale_dtypes))
        x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if m % 2 else None
        check(x, q, bias, act_bits, f"{isa} {m, n, k} group {group_size}")


def test_int8_activations_are_near_the_unrounded_product(isa, dtype):
    # Uniform rounding of Gaussian rows at absmax / 127: the absmax of 512 is near 3.1 sigma and the
    # noise is step^2 / 12, so 10 log10(12 * 127^2 / 3.1^2) = 43 dB. 38 leaves room for the largest
    # of the rows' maxima.
    q = weight(64, 512, 4)
    x = torch.randn(40, 512).to(dtype)
    truth = F.linear(x.double(), dequantized(q))
    noise = ops.quantized_linear(x, q, act_bits=8).double() - truth
    assert 10 * torch.log10(truth.square().sum() / noise.square().sum()) > 38


def test_integer_part_is_exact(isa):
    # scales are 1, integer runs of 32 have absmax 127: every product and sum is an integer below
    # 2^24
    for bits, m in itertools.product((4, 8), (1, 40)):
        top = 7 if bits == 4 else 127
        codes = torch.randint(-top - 1, top + 1, (33, 130))
        stored = reference_pack(codes, bits)
        q = QuantizedWeight(stored, torch.ones(33, 5), None, bits, 32, (33, 130))
        x = torch.randint(-127, 128, (m, 130))
        x[:, ::32] = 127
        y = ops.quantized_linear(x.float(), q, act_bits=8)
        # every scale is 127 / 127 = 1
        assert torch.equal(y.double(), x.double() @ codes.t().double())


def reference_pack(codes, bits):
    if bits == 8:
        return codes.to(torch.int8)
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] + 16 * nibbles[:, 1::2]


def test_extreme_codes(isa):
    """-128 and the ends of int4 times 127, where saturating instructions would fail."""
    for bits, sign in itertools.product((4, 8), (1, -1)):
        codes = torch.full((17, 128), -8 if bits == 4 else -128)
        q = QuantizedWeight(
            reference_pack(codes, bits), torch.ones(17, 1), None, bits, 128, (17, 128)
        )
        for m in (1, 40):
            x = torch.full((m, 128), 127.0 * sign)
            for act_bits in (8, 16):
                y = ops.quantized_linear(x, q, act_bits=act_bits)
                assert torch.equal(y, x @ codes.t().float())


def test_an_outlier_costs_only_its_own_run(isa, dtype):
    # with one scale per row the others would be 127 / 1000 of a step each, i.e. zero
    for k, group_size, alone in ((256, 32, 32), (1536, -1, reference.RUN_MAX)):
        q = weight(30, k, 8, group_size)
        for m in (2, 40):
            x = torch.rand(m, k).to(dtype) + 1
            x[:, 0] = 1000
            rest = QuantizedWeight(
                q.qdata.clone().index_fill_(1, torch.arange(alone), 0),
                *(q.scales, None, 8, q.group_size, (30, k)),
            )
            got = ops.quantized_linear(x, rest, act_bits=8).double()
            truth = F.linear(x.double(), dequantized(rest))
            noise = (got - truth).square().sum() / truth.square().sum()
            assert noise < 1e-3, (m, k)


def test_rows_of_zeros_and_nan(isa, dtype):
    q = weight(20, 64, 4)
    for m in (3, 30):
        x = torch.randn(m, 64).to(dtype)
        x[0] = 0
        x[1, 5] = float("nan")
        for act_bits in (8, 16):
            y = ops.quantized_linear(x, q, act_bits=act_bits)
            assert torch.equal(y[0], torch.zeros(20, dtype=dtype))
            assert y[1].isnan().all()
            assert y[2].isfinite().all()


def test_strided_empty_and_leading_dimensions(isa, dtype):
    q = weight(24, 48, 8, 16)
    base = torch.randn(12, 96).to(dtype)
    for x in (base[:, 8:56], base[::3, :48], torch.randn(48, 5).to(dtype).t()):
        for act_bits in (8, 16):
            assert torch.equal(
                ops.quantized_linear(x, q, act_bits=act_bits),
                ops.quantized_linear(x.contiguous(), q, act_bits=act_bits),
            )
    x = torch.randn(2, 3, 48).to(dtype)
    assert torch.equal(
        ops.quantized_linear(x, q).view(6, 24), ops.quantized_linear(x.view(6, 48), q)
    )
    assert ops.quantized_linear(torch.empty(0, 48, dtype=dtype), q).shape == (0, 24)
    assert ops.quantized_linear(x, weight(0, 48, 4)).shape == (2, 3, 0)


@pytest.mark.parametrize("m", [1, 6, 70, 300])
def test_same_bits_on_repeat_and_on_one_and_two_threads(isa, dtype, m):
    q = weight(301, 512, 4)
    x, dy = torch.randn(m, 512).to(dtype), torch.randn(m, 301).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            a, b = (ops.quantized_linear(leaf, q, act_bits=bits) for bits in (8, 16))
            results.append((a.detach(), b.detach(), *torch.autograd.grad(b, leaf, dy)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_backward_matches_float64(isa, dtype, bits, symmetric):
    for (m, n, k), group_size in itertools.product(SHAPES, (32, -1)):
        q = weight(n, k, bits, group_size, symmetric)
        x = torch.randn(m, k).to(dtype).requires_grad_()
        bias = torch.randn(n).to(dtype).requires_grad_()
        dy = torch.randn(m, n).to(dtype)
        dx, db = torch.autograd.grad(ops.quantized_linear(x, q, bias), (x, bias), dy)
        naive = dy @ q.dequantize(dtype)
        truth = dy.double() @ dequantized(q)
        assert_near(
            dx, naive, truth, factor=3, floor=sum_floor(dtype, n), what=f"dx {isa} {m, n, k}"
        )
        assert_near(db, dy.sum(0), dy.double().sum(0), factor=3, what="db")


@pytest.mark.parametrize("k", [8192, 13500])  # without a workspace, and with one for most formats
def test_one_long_row(isa, dtype, k):
    for bits, act_bits in itertools.product((4, 8), (8, 16)):
        x = torch.randn(1, k).to(dtype)
        check(x, weight(3, k, bits, 8, symmetric=False), None, act_bits)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    act_bits=st.sampled_from([8, 16]),
    group_size=st.sampled_from([8, 16, 24, 64, 128, -1]),
    symmetric=st.booleans(),
)
def test_any_shape_agrees_with_reference(m, n, k, bits, act_bits, group_size, symmetric):
    q = weight(n, k, bits, group_size, symmetric)
    x = torch.randn(m, k)
    mine = ops.quantized_linear(x, q, act_bits=act_bits)
    with backend.use_backend("reference"):
        theirs = ops.quantized_linear(x, q, act_bits=act_bits)
    # float32 sums of k terms with a size of about 3
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5 * k**0.5)


def test_dequantize_on_every_isa(isa, dtype):
    for bits, symmetric in itertools.product((4, 8), (True, False)):
        q = weight(13, 517, bits, 40, symmetric, torch.float32)
        with backend.use_backend("reference"):
            expected = q.dequantize(dtype)
        # a fused multiply-add rounds once where the reference rounds twice
        torch.testing.assert_close(q.dequantize(dtype), expected, rtol=2 * ULP[dtype], atol=1e-6)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_opcheck(act_bits):
    q = weight(12, 40, 4, 16, symmetric=act_bits == 8)
    bias = torch.randn(12, requires_grad=True)
    for shape in ((5, 40), (2, 3, 40)):
        torch.library.opcheck(
            torch.ops.fastlm.quantized_linear.default,
            (
                torch.randn(shape, requires_grad=True),
                *(q.qdata, q.scales, q.zeros, bias, 4, 16, act_bits),
            ),
        )
    for dy in (torch.randn(5, 12), torch.randn(2, 3, 12)):
        torch.library.opcheck(
            torch.ops.fastlm.quantized_linear_backward.default,
            (dy, q.qdata, q.scales, q.zeros, 4, 16, 40),
        )
    torch.library.opcheck(
        torch.ops.fastlm.dequantize.default,
        (q.qdata, q.scales, q.zeros, 4, 16, 40, torch.bfloat16),
    )


def test_gradcheck_of_the_reference():
    q = weight(6, 16, 8, 8, symmetric=False)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.quantized_linear(x, q, b), (x, bias))


def test_compiles_without_break_or_recompile():
    q = weight(32, 64, 4)
    assert_compiles_once(
        lambda x: ops.quantized_linear(x, q) * 2,
        [(torch.randn(m, 64, requires_grad=True),) for m in (4, 9, 17)],
    )


def test_refusals():
    q = weight(6, 16, 8, 8)
    x = torch.randn(2, 16)
    with pytest.raises(InputError, match=r"x: wanted shape \(..., 16\) .*got \(2, 17\)"):
        ops.quantized_linear(torch.randn(2, 17), q)
    with pytest.raises(InputError, match=r"x: wanted a float dtype, got torch\.int64"):
        ops.quantized_linear(torch.ones(2, 16, dtype=torch.int64), q)
    with pytest.raises(InputError, match="act_bits: wanted 8 or 16, got 4"):
        ops.quantized_linear(x, q, act_bits=4)
    with pytest.raises(
        InputError, match=r"bias: wanted a float tensor \(6,\) on cpu, got .*\(5,\)"
    ):
        ops.quantized_linear(x, q, torch.randn(5))
    with pytest.raises(ValueError, match=r"workspace: wanted bytes more: [1-9].* got 0"):
        # 40 rows need one; the op allocates it
        args = (q.qdata, q.scales, None, None, 8, 8, 16, 0)
        backend.cpu_extension.quantized_linear(torch.randn(40, 16), *args, torch.empty(40, 6), None)
    with pytest.raises(InputError, match="qweight: wanted a QuantizedWeight, got Tensor"):
        ops.quantized_linear(x, torch.randn(6, 16))
