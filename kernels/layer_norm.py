"""h = x + residual, y = z * weight + bias with z = (h - mean) * rstd,
rstd = 1 / sqrt(mean((h - mean)^2) + eps). Without a weight or a bias that step is left out.

Forward, rows of up to `_MAX_TILE_WIDTH` elements: a program holds ROWS rows in registers, so that x
(and residual) are read once and y (and h) written once. Wider rows are read three times in blocks,
the second and third time from the cache.

    program i:   rows [i * ROWS ...)  x  [0 ... BLOCK)      BLOCK a power of two >= H

The deviations from the rounded mean are summed as well as their squares. Their sum corrects the
rounding error of the mean (Chan, Golub and LeVeque 1983).

Backward, with g = dy * weight: dh = rstd * (g - mean(g) - z * mean(g * z)) + dh_above, dweight and
dbias = sums over rows of dy * z and dy. A program handles every `programs`-th tile of rows and
keeps its shares of dweight and dbias in registers; torch adds the shares in a fixed order. Each
operand is read once. Rows wider than `_MAX_TILE_WIDTH`: one program per row reads it twice for dh.
dweight and dbias have a kernel over columns, which reads dy and h a third time.

    parameters:  program (j, p):  columns [j * BLOCK ...)  x  rows p, p + programs, ...

Statistics, products and sums are float32; h is rounded to x's dtype before it is normalised.
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
# Backward programs per multiprocessor: enough to hide latency; each costs 2 H float32 of shares
_WAVES = 4


@triton.jit
def _affine(z, weight, bias, at, mask):
    """z * weight + bias, where they are not None."""
    if weight is not None:
        z *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def _forward(
    x,  # (rows, width), row stride x_stride
    residual,  # likewise, or None
    weight,  # (width,), or None
    bias,  # (width,), or None
    y,  # (rows, width), contiguous
    h,  # likewise; not written without residual
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (at < width)
    out_at = row[:, None] * width + at
    sum_ = load_sum(
        x, residual, row[:, None] * x_stride + at, row[:, None] * residual_stride + at, mask
    )
    if residual is not None:
        tl.store(h + out_at, sum_, mask=mask)
    wide = sum_.to(tl.float32)
    center = tl.sum(wide, 1) / width
    deviation = tl.where(mask, wide - center[:, None], 0.0)
    lack = tl.sum(deviation, 1) / width
    deviation = tl.where(mask, deviation - lack[:, None], 0.0)
    r = 1.0 / tl.sqrt_rn(tl.sum(deviation * deviation, 1) / width + eps)
    z = _affine(deviation * r[:, None], weight, bias, at, at < width)
    tl.store(y + out_at, z.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, center + lack, mask=row < rows)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def _forward_wide(
    x,  # (rows, width), row stride x_stride
    residual,  # likewise, or None
    weight,  # (width,), or None
    bias,  # (width,), or None
    y,  # (rows, width), contiguous
    h,  # likewise; not written without residual
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    width,
    x_stride,
    residual_stride,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if residual is not None:
        residual += row * residual_stride
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += load_sum(x, residual, at, at, at < width).to(tl.float32)
    center = tl.sum(sums, 0) / width
    deviations = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wide = load_sum(x, residual, at, at, at < width).to(tl.float32)
        d = tl.where(at < width, wide - center, 0.0)
        deviations += d
        squares += d * d
    lack = tl.sum(deviations, 0) / width
    variance = tl.maximum(tl.sum(squares, 0) / width - lack * lack, 0.0)
    r = 1.0 / tl.sqrt_rn(variance + eps)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        sum_ = load_sum(x, residual, at, at, mask)
        if residual is not None:
            tl.store(h + row * width + at, sum_, mask=mask)
        z = ((sum_.to(tl.float32) - center) - lack) * r
        z = _affine(z, weight, bias, at, mask)
        tl.store(y + row * width + at, z.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, center + lack)
    tl.store(rstd + row, r)


@triton.jit
def _backward(
    dy,  # (rows, width), row stride dy_stride
    dh_above,  # likewise, or None
    h,  # likewise
    weight,  # (width,), or None
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    dh,  # (rows, width), contiguous
    dweight,  # (programs, width) float32, contiguous, or None
    dbias,  # likewise
    rows,
    width,
    dy_stride,
    above_stride,
    h_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    weights = tl.zeros([ROWS, BLOCK], tl.float32)
    biases = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (at < width)
        m = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        d = tl.load(dy + row[:, None] * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(h + row[:, None] * h_stride + at, mask=mask, other=0.0).to(tl.float32)
        z = (z - m) * r  # where there is no element, d and g are 0
        if dweight is not None:
            weights += d * z
        if dbias is not None:
            biases += d
        g = d
        if weight is not None:
            g = d * w
        g_mean, product = tl.sum(g, 1) / width, tl.sum(g * z, 1) / width
        grad = r * (g - g_mean[:, None] - z * product[:, None])
        if dh_above is not None:
            from_above = row[:, None] * above_stride + at
            grad += tl.load(dh_above + from_above, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + row[:, None] * width + at, grad.to(dh.dtype.element_ty), mask=mask)
    column = tl.arange(0, BLOCK)
    out_at = program * width + column
    if dweight is not None:
        tl.store(dweight + out_at, tl.sum(weights, 0), mask=column < width)
    if dbias is not None:
        tl.store(dbias + out_at, tl.sum(biases, 0), mask=column < width)


@triton.jit
def _backward_wide(
    dy,  # (rows, width), row stride dy_stride
    dh_above,  # likewise, or None
    h,  # likewise
    weight,  # (width,), or None
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    dh,  # (rows, width), contiguous
    width,
    dy_stride,
    above_stride,
    h_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m, r = tl.load(mean + row), tl.load(rstd + row)
    gs = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        g = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        g = _affine(g, weight, None, at, mask)
        z = (tl.load(h + row * h_stride + at, mask=mask, other=0.0).to(tl.float32) - m) * r
        gs += g
        products += g * z
    g_mean, product = tl.sum(gs, 0) / width, tl.sum(products, 0) / width
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        g = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        g = _affine(g, weight, None, at, mask)
        z = (tl.load(h + row * h_stride + at, mask=mask, other=0.0).to(tl.float32) - m) * r
        grad = r * (g - g_mean - z * product)
        if dh_above is not None:
            grad += tl.load(dh_above + row * above_stride + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + row * width + at, grad.to(dh.dtype.element_ty), mask=mask)


@triton.jit
def _parameter_gradients(
    dy,  # (rows, width), row stride dy_stride
    h,  # likewise
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    dweight,  # (programs, width) float32, contiguous, or None
    dbias,  # likewise
    rows,
    width,
    dy_stride,
    h_stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    weights = tl.zeros([BLOCK], tl.float32)
    biases = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(1)):
        d = tl.load(dy + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        if dweight is not None:
            v = tl.load(h + row * h_stride + at, mask=mask, other=0.0).to(tl.float32)
            weights += d * ((v - tl.load(mean + row)) * tl.load(rstd + row))
        biases += d
    if dweight is not None:
        tl.store(dweight + program * width + at, weights, mask=mask)
    if dbias is not None:
        tl.store(dbias + program * width + at, biases, mask=mask)


_WIDE = Config({"BLOCK": _BLOCK}, num_warps=8)  # 8 elements per thread, as in rms_norm
_COLUMNS = Config({"BLOCK": 1024}, num_warps=4)  # 8 per thread: one 128-bit access if 16-bit


def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = x.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    xs, rs = matrix(x), None if residual is None else matrix(residual)
    parameters = (None if p is None else p.contiguous() for p in (weight, bias))
    operands = (xs, rs, *parameters, y, h, mean, rstd)
    sizes = (width, xs.stride(0), xs.stride(0) if rs is None else rs.stride(0), eps)
    if width > _MAX_TILE_WIDTH:
        launch(_forward_wide, (rows,), *operands, *sizes, config=_WIDE)
    else:
        config = tile(rows, width, _TILE, 16)
        grid = (triton.cdiv(rows, config.sizes["ROWS"]),)
        launch(_forward, grid, *operands, rows, *sizes, config=config)
    return y, h, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    dh_above: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width, rows = h.shape[-1], rstd.numel()
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    ds, hs, above = matrix(dy), matrix(h), None if dh_above is None else matrix(dh_above)
    weight = None if weight is None else weight.contiguous()
    operands = (ds, above, hs, weight, mean, rstd, dh)
    above_stride = ds.stride(0) if above is None else above.stride(0)
    sizes = (width, ds.stride(0), above_stride, hs.stride(0))
    max_programs = _WAVES * multiprocessors(h.device)

    def shares(programs: int) -> list[Tensor | None]:
        return [rstd.new_empty(programs, width) if n else None for n in (need_weight, need_bias)]

    if width > _MAX_TILE_WIDTH:
        launch(_backward_wide, (rows,), *operands, *sizes, config=_WIDE)
        columns = triton.cdiv(width, _COLUMNS.sizes["BLOCK"])
        programs = min(rows, triton.cdiv(max_programs, columns))
        parts = shares(programs)
        if need_weight or need_bias:
            launch(
                _parameter_gradients, (columns, programs), ds, hs, mean, rstd, *parts, rows, width,
                ds.stride(0), hs.stride(0), config=_COLUMNS,
            )  # fmt: skip
    else:
        config = tile(rows, width, _TILE // 2, 8)  # four operands
        programs = min(triton.cdiv(rows, config.sizes["ROWS"]), max_programs)
        parts = shares(programs)
        launch(_backward, (programs,), *operands, *parts, rows, *sizes, config=config)
    dweight, dbias = (rstd.new_empty(0) if p is None else p.sum(0) for p in parts)
    return dh, dweight, dbias
