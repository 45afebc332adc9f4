"""y = x W^T + bias for an int8 or int4 W, dx = dy W, and W itself dequantized; W is read in place.

`fastlm.ops.quantized_weight` describes the layout: rows of W are rows of bytes, int4 columns 2i and
2i + 1 share a byte, and w = scales[n, k // group_size] q (+ zeros[n, k // group_size]). The number
of rows of x selects the form:

    1 to 4      _vector: no matrix instruction; a thread multiplies 16 bytes of a row of W at once
    up to 512   _matrix: W is the left operand, dequantized in registers, y^T = W x^T
    more        _dequantize writes a block of W that fits in L2, then torch's matmul

8-bit activations: _round writes x as int8 and the scale of each run (a group of W's columns, cut at
512). Then _vector or, for any larger number of rows, _integers: int8 products, exact within a tile.

    _matrix, _integers, program (n, m, part):      k ->
        W (N, K) packed      n [ BN x BK ][ BN x BK ] ..   each byte once per BM rows of x
        x (M, K)             m [ BM x BK ][ BM x BK ] ..   from the L2
        y (M, N)             accumulated as BN x BM in float32

Where these tiles are too few for the GPU, K is cut into parts (contiguous ranges of tiles).
_add_parts adds their float32 partial sums in order, so that results are the same bits on every run.

Integers are converted to floats through their bits (2^23 + q is a float whose mantissa ends in q):
the conversion instruction runs at a quarter of the rate of an addition.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm import reference
from fastlm.kernels.launch import Config, TileConfigs, launch, multiprocessors
from fastlm.memory_order import matrix

RUN_MAX = tl.constexpr(reference.RUN_MAX)

# rows of x up to which W is dequantized in the product. Above that, a second pass over W pays off:
# it writes and reads 2 bytes per weight (4.5 in all, 1.3 ps at 3.35 TB/s). 512 rows take that time
# at twice the speed of 700 TFLOP/s, which a product that unpacks its operand does not reach.
# Derived from these figures of an H100; not measured on a GPU.
FUSED_ROWS = 512
# weights dequantized at a time for torch's matmul: 32 MB in 16 bits stay in an H100's 50 MB of L2
_BLOCK_WEIGHTS = 1 << 24
VECTOR_ROWS = 4  # above this, the 16 rows of a matrix instruction cost no more


# ---- numbers -------------------------------------------------------------------------------------


@triton.jit
def _codes(packed, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (ROWS, COLUMNS) of q + 8 (int4) or q + 128 (int8) as int32."""
    if BITS == 4:
        wide = packed.to(tl.int32)
        return tl.join(wide & 15, wide >> 4).reshape(ROWS, COLUMNS)
    else:
        return (packed.to(tl.uint8, bitcast=True) ^ 128).to(tl.int32)


@triton.jit
def _floats(codes, BITS: tl.constexpr):
    """Return q in float32, exactly: 2^23 + code - (2^23 + 8)."""
    offset: tl.constexpr = 8388616.0 if BITS == 4 else 8388736.0
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - offset


@triton.jit
def _spread(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Repeat each value for STEP columns: (ROWS, COLUMNS / STEP) -> (ROWS, COLUMNS)."""
    count: tl.constexpr = COLUMNS // STEP
    if count == 1:
        return t
    else:
        return t[:, :, None].broadcast_to(ROWS, count, STEP).reshape(ROWS, COLUMNS)


@triton.jit
def _group_of(k, GROUP: tl.constexpr):
    """Return the group of a column; GROUP 0 is one group per row."""
    if GROUP == 0:
        return k * 0
    else:
        return k // GROUP


@triton.jit
def _run_of(k, GROUP: tl.constexpr, RUNS: tl.constexpr):
    """Return the run of a column; RUNS is the number of runs per group, unused if GROUP is 0."""
    if GROUP == 0:
        return k // RUN_MAX
    else:
        return (k // GROUP) * RUNS + (k % GROUP) // RUN_MAX


# ---- dequantize ----------------------------------------------------------------------------------


@triton.jit
def _dequantize(
    qdata,  # (N, row_bytes)
    scales,  # (N, groups)
    zeros,  # (N, groups) or None
    out,  # (N, width): columns first .. first + width of W
    first,
    width,
    k,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,  # columns sure to share a scale: BLOCK or a power of 2 dividing GROUP
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = first + tl.program_id(1) * BLOCK
    at = begin * BITS // 8 + tl.arange(0, BLOCK * BITS // 8)
    packed = tl.load(qdata + row * row_bytes + at, mask=at < row_bytes, other=0)
    q = _floats(_codes(packed[None, :], BITS, 1, BLOCK), BITS)
    heads = begin + STEP * tl.arange(0, BLOCK // STEP)
    group = row * groups + _group_of(heads, GROUP)
    scale = tl.load(scales + group, mask=heads < k, other=0.0).to(tl.float32)
    w = q * _spread(scale[None, :], 1, BLOCK, STEP)
    if zeros is not None:
        zero = tl.load(zeros + group, mask=heads < k, other=0.0).to(tl.float32)
        w += _spread(zero[None, :], 1, BLOCK, STEP)
    column = begin - first + tl.arange(0, BLOCK)[None, :]
    out_at = out + row * width + column
    tl.store(out_at, w.to(out.dtype.element_ty), mask=column < width)


# ---- 8-bit activations ---------------------------------------------------------------------------


@triton.jit
def _round(
    x,  # (M, K), row stride x_stride
    q,  # (M, K) int8
    scale,  # (M, runs) float32
    sums,  # (M, runs) float32: scale * sum of q
    k,
    x_stride,
    group_size,
    runs,
    RUNS: tl.constexpr,  # per group; 0: one group
    WIDTH: tl.constexpr,  # a power of 2, at least the longest run
    COUNT: tl.constexpr,  # runs per program
):
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    if RUNS == 0:
        begin = run * RUN_MAX
        end = tl.minimum(begin + RUN_MAX, k)
    else:
        group = run // RUNS
        begin = group * group_size + (run - group * RUNS) * RUN_MAX
        end = tl.minimum(tl.minimum(begin + RUN_MAX, (group + 1) * group_size), k)
    at = begin[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = at < end[:, None]
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    # a maximum may drop NaN; in a sum, infinity and NaN times zero stay NaN
    poison = tl.sum(values * 0.0, 1)
    absmax = tl.maximum(tl.max(tl.abs(values), 1), 1e-30)
    inverse = tl.math.div_rn(tl.full([COUNT], 127.0, tl.float32), absmax)
    # adding 1.5 * 2^23 rounds to nearest even; fma rounds the product before that addition
    product = tl.math.fma(values, inverse[:, None].broadcast_to(COUNT, WIDTH), 0.0)
    rounded = (product + 12582912.0) - 12582912.0
    rounded = tl.where((poison == 0.0)[:, None], rounded, 0.0)
    step = tl.math.div_rn(absmax, tl.full([COUNT], 127.0, tl.float32)) + poison
    tl.store(q + row * k + at, rounded.to(tl.int8), mask=inside)
    tl.store(scale + row * runs + run, step, mask=run < runs)
    tl.store(sums + row * runs + run, step * tl.sum(rounded, 1), mask=run < runs)


# ---- products ------------------------------------------------------------------------------------


@triton.jit
def _vector(
    x,  # (M, K), row stride x_stride; int8 with x_scale
    x_scale,  # (M, runs) float32, or None: x is a float
    qdata,  # (N, row_bytes)
    scales,  # (N, groups)
    zeros,  # (N, groups) or None
    bias,  # (N,) or None
    y,  # (M, N)
    m,
    n,
    k,
    x_stride,
    row_bytes,
    groups,
    runs,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUNS: tl.constexpr,
    CHUNK: tl.constexpr,  # columns that one thread sums before scaling
    ROWS: tl.constexpr,  # rows of x: 1, 2 or 4
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    chunks: tl.constexpr = BK // CHUNK
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, n - 1).to(tl.int64)
    rm = tl.arange(0, ROWS)
    bytes_ = tl.arange(0, BK * BITS // 8)
    total = tl.zeros([ROWS, BN, chunks], tl.float32)
    for begin in range(0, k, BK):
        at = begin * BITS // 8 + bytes_
        packed = tl.load(
            qdata + row[:, None] * row_bytes + at[None, :], mask=at[None, :] < row_bytes, other=0
        )
        w = _floats(_codes(packed, BITS, BN, BK), BITS).reshape(1, BN, chunks, CHUNK)
        column = begin + tl.arange(0, BK)
        inside = (rm < m)[:, None] & (column < k)[None, :]
        values = tl.load(
            x + rm[:, None].to(tl.int64) * x_stride + column[None, :], mask=inside, other=0
        ).to(tl.float32)
        values = values.reshape(ROWS, 1, chunks, CHUNK)
        head = begin + CHUNK * tl.arange(0, chunks)
        group = row[:, None] * groups + _group_of(head, GROUP)[None, :]
        scale = tl.load(scales + group, mask=(head < k)[None, :], other=0.0).to(tl.float32)
        part = tl.sum(w * values, 3) * scale[None, :, :]
        if zeros is not None:
            zero = tl.load(zeros + group, mask=(head < k)[None, :], other=0.0).to(tl.float32)
            part += tl.sum(values, 3) * zero[None, :, :]
        if x_scale is not None:
            run = rm[:, None] * runs + _run_of(head, GROUP, RUNS)[None, :]
            shared = (rm < m)[:, None] & (head < k)[None, :]
            part *= tl.load(x_scale + run, mask=shared, other=0.0)[:, None, :]
        total += part
    result = tl.sum(total, 2)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)[None, :]
    y_at = y + rm[:, None].to(tl.int64) * n + rn[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=(rm < m)[:, None] & (rn < n)[None, :])


@triton.jit
def _tile_of(m, n, BN: tl.constexpr, BM: tl.constexpr):
    """Return this program's block of N and of M. 8 blocks of M run together and share W in L2."""
    program = tl.program_id(0)
    blocks_n, blocks_m = tl.cdiv(n, BN), tl.cdiv(m, BM)
    strip = program // (8 * blocks_n)
    first = strip * 8
    height = tl.minimum(blocks_m - first, 8)
    inside = program - strip * 8 * blocks_n
    return inside // height, first + inside % height


@triton.jit
def _store(total, y, bias, rm, rn, m, n, PARTS: tl.constexpr):
    """Store total (BN, BM) to y (M, N), or to this program's part of (PARTS, M, N) float32."""
    total = tl.trans(total)
    if PARTS == 1:
        if bias is not None:
            total += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[None, :]
    part = tl.program_id(1).to(tl.int64) * m
    y_at = y + (part + rm[:, None]) * n + rn[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(rm < m)[:, None] & (rn < n)[None, :])


@triton.jit
def _matrix(
    x,  # (M, K), row stride x_stride
    qdata,  # (N, row_bytes)
    scales,  # (N, groups)
    zeros,  # (N, groups) or None
    bias,  # (N,) or None
    y,  # (M, N), or (PARTS, M, N) float32
    m,
    n,
    k,
    x_stride,
    row_bytes,
    groups,
    part_tiles,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,  # columns sure to share a scale: BK or a power of 2 dividing GROUP
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    block_n, block_m = _tile_of(m, n, BN, BM)
    rn, rm = block_n * BN + tl.arange(0, BN), block_m * BM + tl.arange(0, BM)
    # rows past the end are computed from the last row and not stored
    row_n, row_m = tl.minimum(rn, n - 1).to(tl.int64), tl.minimum(rm, m - 1).to(tl.int64)
    total = tl.zeros([BN, BM], tl.float32)
    tile = tl.program_id(1) * part_tiles
    for i in range(tile, tl.minimum(tile + part_tiles, tl.cdiv(k, BK))):
        at = i * (BK * BITS // 8) + tl.arange(0, BK * BITS // 8)
        packed = tl.load(
            qdata + row_n[:, None] * row_bytes + at[None, :], mask=at[None, :] < row_bytes, other=0
        )
        head = i * BK + STEP * tl.arange(0, BK // STEP)
        group = row_n[:, None] * groups + _group_of(head, GROUP)[None, :]
        scale = tl.load(scales + group, mask=(head < k)[None, :], other=0.0).to(tl.float32)
        w = _floats(_codes(packed, BITS, BN, BK), BITS) * _spread(scale, BN, BK, STEP)
        if zeros is not None:
            zero = tl.load(zeros + group, mask=(head < k)[None, :], other=0.0).to(tl.float32)
            w += _spread(zero, BN, BK, STEP)
        column = i * BK + tl.arange(0, BK)
        values = tl.load(
            x + row_m[:, None] * x_stride + column[None, :], mask=(column < k)[None, :], other=0.0
        )
        total = tl.dot(w.to(x.dtype.element_ty), tl.trans(values), total, input_precision="ieee")
    _store(total, y, bias, rm, rn, m, n, PARTS)


@triton.jit
def _integers(
    x,  # (M, K) int8
    x_scale,  # (M, runs) float32
    x_sums,  # (M, runs) float32
    qdata,  # (N, row_bytes)
    scales,  # (N, groups)
    zeros,  # (N, groups) or None
    bias,  # (N,) or None
    y,  # (M, N), or (PARTS, M, N) float32
    m,
    n,
    k,
    row_bytes,
    groups,
    runs,
    tiles,
    part_tiles,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUNS: tl.constexpr,
    TILES: tl.constexpr,  # per group: no tile is in two groups
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,  # divides 512, so that no tile is in two runs
):
    block_n, block_m = _tile_of(m, n, BN, BM)
    rn, rm = block_n * BN + tl.arange(0, BN), block_m * BM + tl.arange(0, BM)
    row_n, row_m = tl.minimum(rn, n - 1).to(tl.int64), tl.minimum(rm, m - 1).to(tl.int64)
    total = tl.zeros([BN, BM], tl.float32)
    tile = tl.program_id(1) * part_tiles
    for i in range(tile, tl.minimum(tile + part_tiles, tiles)):
        if GROUP == 0:
            group = 0
            begin = i * BK
            run = begin // RUN_MAX
            begins = begin % RUN_MAX == 0
            end = k
        else:
            group = i // TILES
            inner = (i - group * TILES) * BK
            begin = group * GROUP + inner
            run = group * RUNS + inner // RUN_MAX
            begins = inner % RUN_MAX == 0
            end = tl.minimum((group + 1) * GROUP, k)
        column = begin + tl.arange(0, BK)
        at = begin * BITS // 8 + tl.arange(0, BK * BITS // 8)
        packed = tl.load(
            qdata + row_n[:, None] * row_bytes + at[None, :], mask=at[None, :] < row_bytes, other=0
        )
        if BITS == 4:
            w = (_codes(packed, BITS, BN, BK) - 8).to(tl.int8)
        else:
            w = packed.to(tl.int8, bitcast=True)
        values = tl.load(
            x + row_m[:, None] * k + column[None, :], mask=(column < end)[None, :], other=0
        )
        product = tl.dot(w, tl.trans(values), out_dtype=tl.int32)
        scale = tl.load(scales + row_n * groups + group).to(tl.float32)
        step = tl.load(x_scale + row_m * runs + run)
        total += product.to(tl.float32) * (scale[:, None] * step[None, :])
        if zeros is not None:
            zero = tl.load(zeros + row_n * groups + group).to(tl.float32)
            run_sums = tl.load(x_sums + row_m * runs + run)
            total += tl.where(begins, zero, 0.0)[:, None] * run_sums[None, :]
    _store(total, y, bias, rm, rn, m, n, PARTS)


@triton.jit
def _add_parts(parts, bias, y, n, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add parts and bias: (PARTS, M, N) float32 -> y (M, N), size = M N."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size.to(tl.int64) + at, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


# ---- host ----------------------------------------------------------------------------------------

# 8 16-bit elements per thread: one 128-bit store
_DEQUANTIZE = Config({"BLOCK": 1024}, num_warps=4)
_ROUND = 4096  # elements per program
# a thread holds 32 columns of two rows of W and of each row of x: 4 rows of x fit in registers
_VECTOR = TileConfigs("quantized_linear, vector", {(): {80: Config({"BN": 8, "BK": 1024})}})
# by the rows of x in a tile
_MATRIX = TileConfigs(
    "quantized_linear",
    {
        (16,): {80: Config({"BN": 64, "BM": 16, "BK": 128}, num_warps=4, num_stages=3)},
        (32,): {80: Config({"BN": 64, "BM": 32, "BK": 128}, num_warps=4, num_stages=3)},
        (64,): {80: Config({"BN": 128, "BM": 64, "BK": 64}, num_warps=8, num_stages=3)},
        (128,): {80: Config({"BN": 128, "BM": 128, "BK": 64}, num_warps=8, num_stages=3)},
    },
)
_MATRIX_FLOAT32 = TileConfigs(
    "quantized_linear float32",
    {
        (16,): {80: Config({"BN": 64, "BM": 16, "BK": 32}, num_warps=4, num_stages=2)},
        (64,): {80: Config({"BN": 64, "BM": 64, "BK": 32}, num_warps=8, num_stages=2)},
    },
)
# a tile of 128 x 128 spills: it holds int32 sums in addition to its float32 sums
_INTEGERS = TileConfigs(
    "quantized_linear int8",
    {
        (16,): {80: Config({"BN": 64, "BM": 16}, num_warps=4, num_stages=3)},
        (64,): {80: Config({"BN": 128, "BM": 64}, num_warps=8, num_stages=3)},
    },
)
_ADD = Config({"BLOCK": 1024}, num_warps=4)
MAX_PARTS = 8  # enough for N = 1024 at 64 columns per tile
_PART_TILES = 4  # minimum: a part's loop must be long enough to fill its pipeline


class _Weight:
    """A weight in the form that the kernels expect."""

    def __init__(self, qdata: Tensor, scales: Tensor, zeros: Tensor | None, bits, group_size, k):
        self.qdata, self.scales = qdata.contiguous(), scales.contiguous()
        self.zeros = None if zeros is None else zeros.contiguous()
        self.n, self.k, self.bits = qdata.shape[0], k, bits
        self.row_bytes, self.groups = qdata.shape[1], scales.shape[1]
        self.group = group_size if group_size < k else 0
        self.runs_per_group = triton.cdiv(group_size, reference.RUN_MAX) if self.group else 0
        self.runs = (
            self.runs_per_group * self.groups if self.group else triton.cdiv(k, reference.RUN_MAX)
        )

    def step(self, max_columns: int) -> int:
        """Return how many columns are sure to share a scale in blocks of `max_columns`."""
        return min(max_columns, self.group & -self.group) if self.group else max_columns

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.qdata, self.scales, self.zeros


def _write(w: _Weight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """Dequantize rows and columns of W to the contiguous out; columns begin at a multiple of
    BLOCK."""
    qdata, scales = w.qdata[rows], w.scales[rows]
    zeros = None if w.zeros is None else w.zeros[rows]
    block = _DEQUANTIZE.sizes["BLOCK"]
    launch(
        _dequantize, (out.shape[0], triton.cdiv(out.shape[1], block)), qdata, scales, zeros, out,
        columns.start, out.shape[1], w.k, w.row_bytes, w.groups, config=_DEQUANTIZE,
        BITS=w.bits, GROUP=w.group, STEP=w.step(block),
    )  # fmt: skip
    return out


def dequantize(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    w = _Weight(qdata, scales, zeros, bits, group_size, k)
    out = torch.empty((w.n, k), dtype=dtype, device=qdata.device)
    return _write(w, slice(0, w.n), slice(0, k), out)


def _round_rows(x: Tensor, w: _Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return x in int8 and, per run, its scale and scale * sum."""
    rows = x.shape[0]
    q = torch.empty((rows, w.k), dtype=torch.int8, device=x.device)
    scale, sums = (
        torch.empty((rows, w.runs), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    width = triton.next_power_of_2(min(w.group or w.k, w.k, reference.RUN_MAX))
    count = min(_ROUND // width, triton.next_power_of_2(w.runs))
    launch(
        _round, (rows, triton.cdiv(w.runs, count)), x, q, scale, sums, w.k, x.stride(0), w.group,
        w.runs, config=Config({"WIDTH": width, "COUNT": count}), RUNS=w.runs_per_group,
    )  # fmt: skip
    return q, scale, sums


def _few_rows(x: Tensor, scale: Tensor | None, w: _Weight, bias: Tensor | None, y: Tensor) -> None:
    rows = triton.next_power_of_2(x.shape[0])
    config = _VECTOR.select((), x)
    grid = (triton.cdiv(w.n, config.sizes["BN"]),)
    launch(
        _vector, grid, x, scale, *w.tensors(), bias, y, x.shape[0], w.n, w.k, x.stride(0),
        w.row_bytes, w.groups, w.runs, config=config, BITS=w.bits, GROUP=w.group,
        RUNS=w.runs_per_group, CHUNK=w.step(32), ROWS=rows,
    )  # fmt: skip


class _Tiling(NamedTuple):
    config: Config
    grid: tuple[int, int]
    parts: int
    part_tiles: int
    output: Tensor  # y, or (parts, M, N) float32


def _tiling(config: Config, tiles: int, w: _Weight, y: Tensor) -> _Tiling:
    m, n = y.shape
    blocks = triton.cdiv(n, config.sizes["BN"]) * triton.cdiv(m, config.sizes["BM"])
    # two programs per multiprocessor, but partial sums (written and read, 8 M bytes per row of W)
    # must not exceed the row itself
    max_parts = min(2 * multiprocessors(y.device) // blocks, w.row_bytes // (8 * m))
    part_tiles = triton.cdiv(tiles, max(1, min(max_parts, MAX_PARTS, tiles // _PART_TILES)))
    parts = triton.cdiv(tiles, part_tiles)
    output = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=y.device)
    return _Tiling(config, (blocks, parts), parts, part_tiles, output)


def _add(t: _Tiling, bias: Tensor | None, y: Tensor) -> None:
    if t.parts > 1:
        grid = (triton.cdiv(y.numel(), _ADD.sizes["BLOCK"]),)
        size = y.numel()
        launch(_add_parts, grid, t.output, bias, y, y.shape[1], size, config=_ADD, PARTS=t.parts)


def _select_rows_config(tiles: TileConfigs, x: Tensor) -> Config:
    """Return the narrowest tile that holds all rows of x, or the widest."""
    fitting = (key for key in tiles.table if key[0] >= x.shape[0])
    return tiles.select(min(fitting, default=max(tiles.table)), x)


def _fused_rows(x: Tensor, w: _Weight, bias: Tensor | None, y: Tensor) -> None:
    config = _select_rows_config(_MATRIX_FLOAT32 if x.dtype == torch.float32 else _MATRIX, x)
    t = _tiling(config, triton.cdiv(w.k, config.sizes["BK"]), w, y)
    launch(
        _matrix, t.grid, x, *w.tensors(), bias, t.output, *y.shape, w.k, x.stride(0), w.row_bytes,
        w.groups, t.part_tiles, config=config, BITS=w.bits, GROUP=w.group,
        STEP=w.step(config.sizes["BK"]), PARTS=t.parts,
    )  # fmt: skip
    _add(t, bias, y)


def _integer_rows(
    x: Tensor, scale: Tensor, sums: Tensor, w: _Weight, bias: Tensor | None, y: Tensor
) -> None:
    # a tile is within one group; int8 instructions multiply at least 32 columns
    width = min(128, max(32, triton.next_power_of_2(w.group or w.k)))
    config = _select_rows_config(_INTEGERS, x)
    config = replace(config, sizes={**config.sizes, "BK": width})
    tiles_per_group = triton.cdiv(w.group, width)
    full_groups = w.groups - 1 if w.group else 0  # groups; the last may be short
    tiles = full_groups * tiles_per_group + triton.cdiv(w.k - full_groups * w.group, width)
    t = _tiling(config, tiles, w, y)
    launch(
        _integers, t.grid, x, scale, sums, *w.tensors(), bias, t.output, *y.shape, w.k, w.row_bytes,
        w.groups, w.runs, tiles, t.part_tiles, config=config, BITS=w.bits, GROUP=w.group,
        RUNS=w.runs_per_group, TILES=tiles_per_group, PARTS=t.parts,
    )  # fmt: skip
    _add(t, bias, y)


def _many_rows(x: Tensor, w: _Weight, bias: Tensor | None, y: Tensor) -> None:
    if bias is not None:
        bias = bias.to(y.dtype)
    step = max(1, _BLOCK_WEIGHTS // w.k)
    for begin in range(0, w.n, step):
        rows = slice(begin, min(begin + step, w.n))
        block = torch.empty((rows.stop - begin, w.k), dtype=x.dtype, device=x.device)
        block = _write(w, rows, slice(0, w.k), block).t()
        if bias is None:
            torch.mm(x, block, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, block, out=y[:, rows])


def quantized_linear_forward(
    x: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    k = x.shape[-1]
    w = _Weight(qdata, scales, zeros, bits, group_size, k)
    out = torch.empty((*x.shape[:-1], w.n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, y = matrix(x), out.view(-1, w.n)
    bias = None if bias is None else bias.contiguous()
    few = x.shape[0] <= VECTOR_ROWS
    if act_bits == 8:
        q, scale, sums = _round_rows(x, w)
        if few:
            _few_rows(q, scale, w, bias, y)
        else:
            _integer_rows(q, scale, sums, w, bias, y)
    elif few:
        _few_rows(x, None, w, bias, y)
    elif x.shape[0] <= FUSED_ROWS:
        _fused_rows(x, w, bias, y)
    else:
        _many_rows(x, w, bias, y)
    return out


def quantized_linear_backward(
    dy: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    w = _Weight(qdata, scales, zeros, bits, group_size, k)
    out = torch.empty((*dy.shape[:-1], k), dtype=dy.dtype, device=dy.device)
    if out.numel() == 0 or w.n == 0:
        return out.zero_()
    dy, dx = matrix(dy), out.view(-1, k)
    # blocks of columns, so that sums over rows of W are not split
    block = _DEQUANTIZE.sizes["BLOCK"]
    step = max(block, _BLOCK_WEIGHTS // w.n // block * block)
    for begin in range(0, k, step):
        columns = slice(begin, min(begin + step, k))
        part = torch.empty((w.n, columns.stop - begin), dtype=dy.dtype, device=dy.device)
        torch.mm(dy, _write(w, slice(0, w.n), columns, part), out=dx[:, columns])
    return out
