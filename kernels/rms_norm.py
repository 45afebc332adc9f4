"""h = x + residual, y = h * rstd * (offset + weight) with rstd = 1 / sqrt(mean(h^2) + eps).

Forward, rows of up to `_MAX_TILE_WIDTH` elements: a program holds ROWS rows in registers, so that x
(and residual) are read once and y (and h) written once. Wider rows are read twice in blocks, the
second time from the cache.

    program i:   rows [i * ROWS ...)  x  [0 ... BLOCK)      BLOCK a power of two >= H

Backward, with g = dy * (offset + weight): dh = rstd * (g - h * rstd^2 * mean(g * h)) + dh_above,
dweight = sum over rows of dy * h * rstd. A program handles every `programs`-th tile of rows and
keeps its share of dweight in registers; torch adds the shares in a fixed order. Each operand is
read once. Rows wider than `_MAX_TILE_WIDTH`: one program per row reads it twice for dh. dweight has
a kernel over columns, which reads dy and h a third time.

    dweight:  program (j, p):  columns [j * BLOCK ...)  x  rows p, p + programs, ...

Statistics, products and sums are float32; h is rounded to x's dtype before it is normalised.
Nothing was measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config, launch, multiprocessors
from fastlm.kernels.rows import load_sum, matrix, tile

# elements of a row in registers: 16 to 32 per thread for each of up to four operands
_MAX_TILE_WIDTH = 8192
_TILE = 4096  # elements of narrow rows per program of the forward; half of that in the backward
_BLOCK = 2048  # elements of a wide row at a time
# Backward programs per multiprocessor: enough to hide latency; each costs H float32 of dweight
_WAVES = 4


@triton.jit
def _rstd(squares, width, eps):
    return 1.0 / tl.sqrt_rn(squares / width + eps)


@triton.jit
def _forward(
    x,  # (rows, width), row stride x_stride
    residual,  # likewise, or None
    weight,  # (width,), or None
    y,  # (rows, width), contiguous
    h,  # likewise, or None
    rstd,  # (rows,) float32
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (at < width)[None, :]
    from_x = row[:, None] * x_stride + at[None, :]
    out_at = row[:, None] * width + at[None, :]
    from_residual = row[:, None] * residual_stride + at[None, :]
    sum_ = load_sum(x, residual, from_x, from_residual, mask)
    if residual is not None:
        tl.store(h + out_at, sum_, mask=mask)
    wide = sum_.to(tl.float32)
    r = _rstd(tl.sum(wide * wide, 1), width, eps)
    scaled = wide * r[:, None]
    if weight is not None:
        w = offset + tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        scaled *= w[None, :]
    tl.store(y + out_at, scaled.to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def _forward_wide(
    x,  # (rows, width), row stride x_stride
    residual,  # likewise, or None
    weight,  # (width,), or None
    y,  # (rows, width), contiguous
    h,  # likewise, or None
    rstd,  # (rows,) float32
    width,
    x_stride,
    residual_stride,
    eps,
    offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wide = load_sum(
            x, residual, row * x_stride + at, row * residual_stride + at, at < width
        ).to(tl.float32)
        squares += wide * wide
    r = _rstd(tl.sum(squares, 0), width, eps)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        sum_ = load_sum(x, residual, row * x_stride + at, row * residual_stride + at, mask)
        if residual is not None:
            tl.store(h + row * width + at, sum_, mask=mask)
        scaled = sum_.to(tl.float32) * r
        if weight is not None:
            scaled *= offset + tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row * width + at, scaled.to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + row, r)


@triton.jit
def _backward(
    dy,  # (rows, width), row stride dy_stride
    dh_above,  # likewise, or None
    h,  # likewise
    weight,  # (width,), or None
    rstd,  # (rows,) float32
    dh,  # (rows, width), contiguous
    dweight,  # (programs, width) float32, contiguous; None without a weight
    rows,
    width,
    dy_stride,
    above_stride,
    h_stride,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if weight is not None:
        w = offset + tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        share = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (at < width)[None, :]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        d = tl.load(dy + row[:, None] * dy_stride + at[None, :], mask=mask, other=0.0)
        d = d.to(tl.float32)
        normed = tl.load(h + row[:, None] * h_stride + at[None, :], mask=mask, other=0.0)
        normed = normed.to(tl.float32) * r
        g = d
        if weight is not None:
            share += d * normed
            g = d * w[None, :]
        mean = tl.sum(g * normed, 1) / width
        grad = r * (g - normed * mean[:, None])
        if dh_above is not None:
            from_above = row[:, None] * above_stride + at[None, :]
            grad += tl.load(dh_above + from_above, mask=mask, other=0.0).to(tl.float32)
        out_at = row[:, None] * width + at[None, :]
        tl.store(dh + out_at, grad.to(dh.dtype.element_ty), mask=mask)
    if weight is not None:
        tl.store(dweight + program * width + at, tl.sum(share, 0), mask=at < width)


@triton.jit
def _backward_wide(
    dy,  # (rows, width), row stride dy_stride
    dh_above,  # likewise, or None
    h,  # likewise
    weight,  # (width,), or None
    rstd,  # (rows,) float32
    dh,  # (rows, width), contiguous
    width,
    dy_stride,
    above_stride,
    h_stride,
    offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        g = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            g *= offset + tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(h + row * h_stride + at, mask=mask, other=0.0).to(tl.float32) * r
        products += g * normed
    mean = tl.sum(products, 0) / width
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        g = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            g *= offset + tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(h + row * h_stride + at, mask=mask, other=0.0).to(tl.float32) * r
        grad = r * (g - normed * mean)
        if dh_above is not None:
            grad += tl.load(dh_above + row * above_stride + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + row * width + at, grad.to(dh.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(
    dy,  # (rows, width), row stride dy_stride
    h,  # likewise
    rstd,  # (rows,) float32
    dweight,  # (programs, width) float32, contiguous
    rows,
    width,
    dy_stride,
    h_stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    share = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(1)):
        d = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(h + row * h_stride + at, mask=mask, other=0.0).to(tl.float32)
        share += d * (normed * tl.load(rstd + row))
    tl.store(dweight + program * width + at, share, mask=mask)


_WIDE = Config({"BLOCK": _BLOCK}, num_warps=8)  # 8 elements per thread: at 16 ptxas 12.8 spills two
_COLUMNS = Config({"BLOCK": 1024}, num_warps=4)  # 8 per thread: one 128-bit access if 16-bit


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    make = {"dtype": x.dtype, "device": x.device}
    y, h = torch.empty(x.shape, **make), torch.empty(0 if residual is None else x.shape, **make)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    xs, rs = matrix(x), None if residual is None else matrix(residual)
    operands = (xs, rs, None if weight is None else weight.contiguous(), y, h, rstd)
    sizes = (width, xs.stride(0), xs.stride(0) if rs is None else rs.stride(0), eps, offset)
    rows = len(xs)
    if width > _MAX_TILE_WIDTH:
        launch(_forward_wide, (rows,), *operands, *sizes, config=_WIDE)
    else:
        config = tile(rows, width, _TILE, 16)
        grid = (triton.cdiv(rows, config.sizes["ROWS"]),)
        launch(_forward, grid, *operands, rows, *sizes, config=config)
    return y, h, rstd


def rms_norm_backward(
    dy: Tensor,
    dh_above: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor]:
    width = h.shape[-1]
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    ds, hs, above = matrix(dy), matrix(h), None if dh_above is None else matrix(dh_above)
    operands = (ds, above, hs, None if weight is None else weight.contiguous(), rstd, dh)
    above_stride = ds.stride(0) if above is None else above.stride(0)
    sizes = (width, ds.stride(0), above_stride, hs.stride(0), offset)
    rows, max_programs = len(hs), _WAVES * multiprocessors(h.device)
    shares = None  # of dweight
    if width > _MAX_TILE_WIDTH:
        launch(_backward_wide, (rows,), *operands, *sizes, config=_WIDE)
        if weight is not None:
            columns = triton.cdiv(width, _COLUMNS.sizes["BLOCK"])
            shares = rstd.new_empty(min(rows, triton.cdiv(max_programs, columns)), width)
            launch(
                _weight_gradient, (columns, len(shares)), ds, hs, rstd, shares, rows, width,
                ds.stride(0), hs.stride(0), config=_COLUMNS,
            )  # fmt: skip
    else:
        config = tile(rows, width, _TILE // 2, 8)  # four operands
        programs = min(triton.cdiv(rows, config.sizes["ROWS"]), max_programs)
        if weight is not None:
            shares = rstd.new_empty(programs, width)
        launch(_backward, (programs,), *operands, shares, rows, *sizes, config=config)
    return dh, rstd.new_empty(0) if shares is None else shares.sum(0)
