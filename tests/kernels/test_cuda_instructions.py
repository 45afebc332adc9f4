"""Tests of each instruction of csrc/cuda/ptx.cuh and each CUDA name that the emulator stands in for
(simt/instructions.cu), one by one, on random data. The expected results come from the PTX ISA
and the CUDA guide, not from our code. On a machine with a GPU the same tests run there, and so
check what the emulator assumes.
"""

import ctypes

import kernel_build
import numpy as np
import pytest
import torch

SOURCE = kernel_build.ROOT / "tests/support/simt/instructions.cu"
LANES = np.arange(32)
EPS = 2.0**-23  # for float32


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    build = kernel_build.by_nvcc if torch.cuda.is_available() else kernel_build.by_gcc
    run = ctypes.CDLL(str(build(SOURCE, tmp_path_factory.mktemp("instructions")))).run
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 5, *[ctypes.c_void_p] * 2, ctypes.c_int]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_nvcc_compiles_these_too(tmp_path, arch):
    if not (kernel_build.cuda_home() / "bin/nvcc").exists():
        pytest.skip("no nvcc here")
    assert kernel_build.by_nvcc(SOURCE, tmp_path, arch).exists()


@pytest.fixture
def call(library, cuda, request):
    way = request.node.callspec.params["cuda"].variant
    seed = int(way or 1)  # none on a GPU

    def call(name, x, out, block=None, fill=-1):
        """Words (threads, in) -> (threads, out), from one block."""
        x = np.ascontiguousarray(x).view(np.uint32)
        there = torch.from_numpy(x.view(np.int32)).to(cuda)
        y = torch.full((len(x), out), fill, dtype=torch.int32, device=cuda)
        shape = block or (len(x), 1, 1)
        fault = library(
            name.encode(), *shape, x.shape[1], out, there.data_ptr(), y.data_ptr(), seed
        )
        assert fault == b""
        return y.cpu().numpy().view(np.uint32)

    return call


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def floats(y):
    return np.ascontiguousarray(y).view(np.float32)


def ulps(got, expected):
    """Distance of float32 values from real ones, in units in the last place of the real ones."""
    expected = np.asarray(expected, np.float64)
    unit = np.spacing(np.maximum(np.abs(expected), 2.0**-126).astype(np.float32)).astype(np.float64)
    return np.abs(got.astype(np.float64) - expected) / unit


# ---- indices, memory, barriers


def test_indices(call):
    y = call("indices", np.zeros((24, 1), np.uint32), 12, block=(4, 3, 2))
    t = np.arange(24)
    assert (y[:, :3] == np.stack([t % 4, t // 4 % 3, t // 12], 1)).all()
    assert (y[:, 3:] == [0, 0, 0, 4, 3, 2, 1, 1, 1]).all()


def test_loads_and_stores(call, rng):
    x = words(rng, 128, 4)
    y = call("loads_and_stores", x, 8)
    assert (y[:, :4] == x[:, ::-1]).all()
    assert (y[:, 4:7] == x[:, :3]).all()
    assert (y[:, 7] == (x[:, 0] & 0xFFFF0000 | 0xFE00 | x[:, 0] >> 24)).all()


def test_copies_fill_with_zeros(call, rng):
    """cp.async copies src-size of cp-size bytes and sets the others to zero."""
    x = words(rng, 128, 8)
    x[:, 4:7] = rng.integers(0, [5, 9, 17], (128, 3))
    actual = call("copies", x, 12).view(np.uint8).reshape(128, 3, 16)
    data = x[:, :4].copy().view(np.uint8)
    for i, size in enumerate((4, 8, 16)):
        valid = np.arange(16) < x[:, 4 + i, None]
        expected = np.where(np.arange(16) < size, np.where(valid, data, 0), 0xFF)
        assert (actual[:, i] == expected).all(), size


def test_dynamic_shared_memory(call, rng):
    x = words(rng, 96, 1)
    y = call("dynamic_shared", x, 2)
    assert (y[:, 0] == np.roll(x[:, 0], -33)).all() and (y[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("named_barriers", lambda t: t ^ 32),
        ("block_barrier", lambda t: (t + 45) % 128),
        ("warp_barrier", lambda t: t ^ 9),
    ],
)
def test_barriers(call, rng, name, source):
    x = words(rng, 128, 1)
    assert (call(name, x, 1) == x[source(np.arange(128))]).all()


# ---- lanes


@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffles(call, rng, width):
    """Compare with the pseudocode of shfl.sync; CUDA's widths are its segment masks."""
    x = np.stack([words(rng, 64), rng.integers(0, 32, 64, dtype=np.uint32)], 1)
    y = call(f"shuffle_{width}", x, 5)
    for warp in range(2):
        value, b = x[32 * warp :][:32].T.astype(np.int64)
        first, last = LANES & ~(width - 1), LANES | (width - 1)
        up, down, across = LANES - b, LANES + b, LANES ^ b
        source = [
            first | b & (width - 1),
            np.where(up >= first, up, LANES),
            np.where(down <= last, down, LANES),
            np.where(across <= last, across, LANES),
        ]
        actual = y[32 * warp :][:32]
        for i, lane in enumerate([*source, source[3]]):
            assert (actual[:, i] == value[lane]).all(), i


def test_shuffles_of_other_types(call, rng):
    x = words(rng, 32, 2)
    y = call("shuffle_of_other_types", x, 3)
    assert (floats(y[:, 0]) == (x[LANES ^ 1, 0] / 3.0).astype(np.float32)).all()
    assert (y[:, 1:] == x[5]).all()


def test_a_shuffle_of_some_lanes(call, rng):
    x = words(rng, 32, 1)
    expected = np.where(LANES[:, None] % 2 == 0, x[LANES ^ 2], 0xFFFFFFFF)
    assert (call("shuffle_of_some", x, 1) == expected).all()


@pytest.mark.parametrize("p", [(0.5, 0.9), (0.0, 1.0), (1.0, 0.0)])
def test_votes(call, rng, p):
    x = (rng.random((64, 2)) < p).astype(np.uint32) * 6  # any number but 0 is true
    y = call("votes", x, 6).astype(np.int64).reshape(2, 32, 6)
    for actual, (lane_values, warp_values) in zip(
        y, (x.reshape(2, 32, 2) != 0).transpose(0, 2, 1), strict=True
    ):
        ballot = (lane_values.astype(np.int64) << LANES).sum()
        assert (actual[:, 0] == ballot).all()
        assert ((actual[:, 1] != 0) == lane_values.any()).all() and (
            (actual[:, 2] != 0) == warp_values.all()
        ).all()
        assert (actual[:8, 3] == ballot & 0xFF).all()
        assert ((actual[:8, 4] != 0) == lane_values[:8].any()).all()
        assert ((actual[:8, 5] != 0) == warp_values[:8].all()).all()


def test_sums_and_maxima(call, rng):
    x = rng.integers(-1000, 1000, (128, 1)).astype(np.float32)  # exact in any order
    y = floats(call("sums", x, 4))
    warps = x.reshape(4, 32)
    assert (y[:, 0] == warps.sum(1).repeat(32)).all()
    assert (y[:, 1] == warps.max(1).repeat(32)).all()
    assert (y[:, 2] == x.sum()).all() and (y[:, 3] == x.max()).all()


def test_atomics(call, rng):
    integers = rng.integers(-1000, 1000, 128).astype(np.int32)
    real = rng.integers(1, 1000, 128).astype(np.float32)
    y = call("atomics", np.stack([integers.view(np.uint32), real.view(np.uint32)], 1), 6)
    assert sorted(y[:, 1]) == list(range(128))
    order = np.argsort(floats(y[:, 2]))  # each returns the sum of the preceding ones
    assert (floats(y[:, 2])[order] == np.cumsum(real[order]) - real[order]).all()
    assert y.view(np.int32)[0, 3] == integers.sum() and y[0, 4] == 128
    assert floats(y[0, 5:]) == real.sum()
    assert set(y.view(np.int32)[:, 0]) <= {0, *range(-128000, 128000)}


def test_atomics_of_global_memory(call, rng):
    x = rng.integers(1, 1000, (128, 1)).astype(np.uint32)
    y = call("atomics_of_global_memory", x, 2, fill=0)
    order = np.argsort(y[:, 1])
    assert (y[order, 1] == np.cumsum(x[order, 0]) - x[order, 0]).all()
    assert y[0, 0] == x.sum() and (y[1:, 0] == 0).all()


# ---- matrices


def rows_and_addresses(rng, matrices):
    """32 rows of 8 16-bit elements. Lanes 8 i to 8 i + 7 provide the row addresses of matrix i."""
    x = words(rng, 32, 8)
    x[:, 4] = rng.permutation(32)
    elements = x[:, :4].copy().view(np.uint16)  # (32, 8)
    return x, elements[x[: 8 * matrices, 4]].reshape(matrices, 8, 8)


@pytest.mark.parametrize("matrices", [4, 2])
def test_matrices(call, rng, matrices):
    """ldmatrix: thread T holds row T / 4, elements 2 (T % 4) and the next; lower half first."""
    x, m = rows_and_addresses(rng, matrices)
    actual = call(f"matrices_{matrices}", x, matrices).view(np.uint16).reshape(32, matrices, 2)
    for i in range(matrices):
        for e in range(2):
            assert (actual[:, i, e] == m[i, LANES // 4, LANES % 4 * 2 + e]).all()


def test_transposed_matrices(call, rng):
    """.trans: the same for each matrix transposed."""
    x, m = rows_and_addresses(rng, 4)
    actual = call("matrices_4_transposed", x, 4).view(np.uint16).reshape(32, 4, 2)
    for i in range(4):
        for e in range(2):
            assert (actual[:, i, e] == m[i].T[LANES // 4, LANES % 4 * 2 + e]).all()


# row and column of element i of lane T's fragment, with group = T >> 2 and member = T % 4
GROUP, MEMBER = LANES >> 2, LANES % 4
LAYOUTS = {
    2: {  # "Matrix Fragments for mma.m16n8k16 with floating point type"
        "a": (
            8,
            lambda i: GROUP + (0 if i < 2 or 4 <= i < 6 else 8),
            lambda i: MEMBER * 2 + (i & 1) + (0 if i < 4 else 8),
        ),
        "b": (4, lambda i: MEMBER * 2 + (i & 1) + (0 if i < 2 else 8), lambda i: GROUP),
    },
    1: {  # "Matrix Fragments for mma.m16n8k32" with .s8
        "a": (
            16,
            lambda i: GROUP + (0 if i < 4 or 8 <= i < 12 else 8),
            lambda i: MEMBER * 4 + (i & 3) + (0 if i < 8 else 16),
        ),
        "b": (8, lambda i: MEMBER * 4 + (i & 3) + (0 if i < 4 else 16), lambda i: GROUP),
    },
}
ACCUMULATOR = (4, lambda i: GROUP + (0 if i < 2 else 8), lambda i: MEMBER * 2 + (i & 1))


def fragment(matrix, layout):
    """(rows, columns) -> (32, elements per lane)."""
    elements, row, column = layout
    return np.stack([matrix[row(i), column(i)] for i in range(elements)], 1)


def multiply(call, name, a, b, d):
    """Bits of a (16, K), b (K, 8) and d (16, 8) -> d + a b in the layout of the lanes."""
    layout = LAYOUTS[a.itemsize]
    parts = [(a, layout["a"]), (b, layout["b"]), (d, ACCUMULATOR)]
    registers = [np.ascontiguousarray(fragment(m, of)).view(np.uint32) for m, of in parts]
    return call(name, np.concatenate(registers, 1), 4)


def bits_of(values, name):
    dtype = torch.bfloat16 if name == "product_bf16" else torch.float16
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy()


def values_of(bits, name):
    dtype = torch.bfloat16 if name == "product_bf16" else torch.float16
    return torch.from_numpy(bits).view(dtype).double().numpy()


@pytest.mark.parametrize("name", ["product_bf16", "product_f16"])
def test_products_of_integers_are_exact(call, rng, name):
    a, b, d = (rng.integers(-100, 100, s).astype(np.float32) for s in ((16, 16), (16, 8), (16, 8)))
    y = multiply(call, name, bits_of(a, name), bits_of(b, name), d)
    assert (floats(y) == fragment(a @ b + d, ACCUMULATOR)).all()


@pytest.mark.parametrize("name", ["product_bf16", "product_f16"])
def test_products(call, rng, name):
    scales = 2.0 ** rng.integers(-12, 4, (16, 16))
    a, b = (
        bits_of(x, name) for x in (rng.normal(size=(16, 16)) * scales, rng.normal(size=(16, 8)))
    )
    d = rng.normal(size=(16, 8)).astype(np.float32)
    y = floats(multiply(call, name, a, b, d))
    a, b = values_of(a, name), values_of(b, name)
    # The products are exact. The order in which the 17 terms are added is not specified, but each
    # addition is in float32 at least, with truncation: half an ulp more each than with rounding.
    bound = 17 * EPS * (np.abs(a) @ np.abs(b) + np.abs(d))
    assert (np.abs(y - fragment(a @ b + d, ACCUMULATOR)) <= fragment(bound, ACCUMULATOR)).all()


def test_products_of_int8(call, rng):
    """The products are exact, and without .satfinite a sum wraps around."""
    a, b = (rng.integers(-128, 128, s).astype(np.int8) for s in ((16, 32), (32, 8)))
    d = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    d[::2] = 2**31 - 1
    y = multiply(call, "product_s8", a, b, d)
    expected = (a.astype(np.int64) @ b + d).astype(np.uint32)
    assert (y == fragment(expected, ACCUMULATOR)).all()


# ---- bits and numbers


def test_truth_tables(call, rng):
    """lop3: each result bit is bit a << 2 | b << 1 | c of the table."""
    x = words(rng, 32, 3)
    y = call("truth_tables", x, 256)
    a, b, c = ((x[:, i, None] >> LANES.astype(np.uint32)) & 1 for i in range(3))
    index = a << 2 | b << 1 | c  # (32, 32 bits)
    for table in range(256):
        expected = (np.uint64(table) >> index.astype(np.uint64) & np.uint64(1)) << LANES.astype(
            np.uint64
        )
        assert (y[:, table] == expected.sum(1)).all(), table


def test_bits(call, rng):
    x = words(rng, 128, 3)
    y = call("bits", x, 6)
    a, b, c = x.T
    # prmt: a nibble of the selector chooses a byte of {b, a}; with its top bit, only that byte's
    # sign
    both = np.concatenate([x[:, :1].copy().view(np.uint8), x[:, 1:2].copy().view(np.uint8)], 1)
    for i in range(4):
        nibble = (c >> (4 * i)) & 0xF
        byte = both[np.arange(128), nibble & 7]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        assert ((y[:, 0] >> (8 * i) & 0xFF) == byte).all()
    assert (y[:, 1] == a.astype(np.uint64) * b >> 32).all()
    dots = (x[:, :1].copy().view(np.int8).astype(np.int64) * x[:, 1:2].copy().view(np.int8)).sum(1)
    assert (y[:, 2] == (dots + c.view(np.int32)).astype(np.uint32)).all()
    assert (y[:, 3] == a & 0x7F7FFFFF).all()
    assert (y[:, 4].view(np.int32) == np.minimum(a.view(np.int32), b.view(np.int32))).all()
    assert (y[:, 5].view(np.int32) == np.maximum(a.view(np.int32), b.view(np.int32))).all()


def test_numbers(call, rng):
    parts = np.exp(rng.normal(0, 20, 128)), rng.uniform(-80, 80, 128), rng.normal(0, 1e4, 128)
    x = np.stack(parts, 1).astype(np.float32)
    y = call("numbers", x, 14)
    actual = floats(y)
    a, b, c = x.T.astype(np.float64)
    single = x.T
    # error bounds from the CUDA guide, "Mathematical Functions"
    assert ulps(actual[:, 0], a**-0.5).max() <= 2
    assert (ulps(actual[:, 1], np.exp(b)) <= 2 + np.floor(np.abs(1.173 * b))).all()
    logs = np.abs(actual[:, 2] - np.log(a))
    near = (a >= 0.5) & (a <= 2)
    assert (logs[near] <= 2.0**-21.41).all() and (ulps(actual[:, 2], np.log(a))[~near] <= 3).all()
    assert ulps(actual[:, 4], b / c).max() <= 2
    assert ulps(actual[:, 10], np.exp2(b)).max() <= 2
    # rounded once, to nearest
    assert (actual[:, 3] == single[1] / single[2]).all()
    assert (actual[:, 5] == np.sqrt(single[0])).all()
    assert (actual[:, 6] == np.float32(1) / single[2]).all()
    assert (actual[:, 7] == single[1] * single[2]).all()
    assert (y[:, 9].view(np.int32) == np.rint(b)).all()
    assert (actual[:, 11] == single[0] * single[1] + single[2]).all()
    assert (actual[:, 12] == np.maximum(single[1], single[2])).all()
    assert (actual[:, 13] == np.minimum(single[1], single[2])).all()
    # float64 holds the product of two float32 exactly; rounding the sum adds half an ulp
    assert ulps(actual[:, 8], a * b + c).max() <= 0.5 + 2**-20


def test_numbers_at_the_edges(call):
    inf, nan, largest = np.inf, np.nan, np.finfo(np.float32).max
    b = np.float32(
        [nan, inf, -inf, 3e9, -3e9, 0.5, 1.5, -0.5, -2.5, 2147483520, -126, -127, 130, 1]
    )
    c = np.array([1, 1, 1, 1, 1, 1, nan, 1, 1, inf, largest, 2.0**127, 1, nan], np.float32)
    x = np.stack([np.ones_like(b), b, c], 1)
    y = call("numbers", x, 14)
    # cvt.rni.s32.f32: ties to even, clamped, NaN to 0
    i32 = np.iinfo(np.int32)
    expected = [0, i32.max, i32.min, i32.max, i32.min, 0, 2, 0, -2, 2147483520, -126, -127, 130, 1]
    assert y[:, 9].view(np.int32).tolist() == expected
    actual = floats(y)
    # 2^b, or 0 if it is below 2^-126
    assert np.isnan(actual[0, 10]) and actual[1, 10] == inf and actual[2, 10] == 0
    assert actual[10, 10] == 2.0**-126 and actual[11, 10] == 0 and actual[12, 10] == inf
    # __fdividef: 0 if 2^126 < |c| < 2^128, and NaN for infinity
    assert (actual[9:12, 4] == 0).all() and np.isnan(actual[0, 4]) and actual[1, 4] == inf
    # for a number and NaN: the number
    assert (
        actual[0, 12] == 1 and actual[6, 12] == 1.5 and actual[0, 13] == 1 and actual[13, 13] == 1
    )


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_conversions(call, rng, name):
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    x = np.concatenate(
        [
            words(rng, 600),
            (words(rng, 300) & 0xFFFF0000) | 0x8000,  # halfway between two bfloat16 values
            (words(rng, 124) & 0x0FFFE000) | 0x31001000,  # and two float16 values
        ]
    )
    y = call(name, x[:, None], 2)
    source = torch.from_numpy(x.view(np.float32))
    expected = source.to(dtype)
    actual = torch.from_numpy(y[:, 0].astype(np.uint16).view(np.int16)).view(dtype)
    assert torch.equal(actual.isnan(), source.isnan())
    not_nan = ~source.isnan()
    assert torch.equal(actual[not_nan].view(torch.int16), expected[not_nan].view(torch.int16))
    back = torch.from_numpy((x & 0xFFFF).astype(np.uint16).view(np.int16)).view(dtype).float()
    assert torch.equal(torch.from_numpy(floats(y[:, 1])).nan_to_num(9), back.nan_to_num(9))
