"""Compute dq, dk, dv, dsinks and dbias of attention from out and lse. Scores are recomputed.

    P = exp(s - lse)    dP = dropout(dout v^T)    delta = sum(dout out) - dlse
    dS = P (dP - delta)    dv = dropout(P)^T dout    dbias = dS
    dS through the softcap    dq = scale dS k    dk = scale dS^T q

    _delta   rows                                        delta, one number per row
    _dq      BLOCK_M rows x the keys that they see       dq
    _dkdv    BLOCK_N keys x the rows that see them, of   dk, dv: one program adds to each element,
             every query head of the key head            so that results are bitwise reproducible
    _dbias   a tile of dbias x whatever it is broadcast  dbias
             over: sequences, heads, rows, keys

Seven products of rows x keys, where five are the minimum: computing dq separately from dk and dv
needs neither atomic additions nor float32 copies of dq. dbias costs two more products and no memory
beyond itself; a bias with few elements runs few programs. A program reads each operand once: those
of its own tile, and those along which it iterates (mostly from L2). None of this has been measured
on a GPU.

Indices are as in attention_forward.py. Tiles are rows x keys, in `_dkdv` keys x rows. g is a tile
of dout; `base` is explained in `_base`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.attention_forward import (
    LENGTHS,
    LOG2E,
    OPTIONS,
    AttentionShape,
    Dims,
    ScoreOptions,
    ScoreRows,
    SequenceLayout,
    Sizes,
    bias_rows,
    bias_tensor,
    contiguous_float,
    dropout_mask,
    first_part,
    head_bias,
    head_rows,
    key_edges,
    load_tile,
    locate,
    lse_row,
    needs_registers,
    offsets,
    padded_width,
    row_offsets,
    row_tensors,
    scores,
    select_config,
    sequence,
    store_tile,
)
from fastlm.kernels.launch import Config, TileConfigs, jit, launch


@jit(*LENGTHS)
def _delta(
    dout,  # RowTensor of DV elements
    out,  # RowTensor of DV elements
    dlse,  # (B, H, rows) float32 or None
    delta,  # (B, H, rows) float32
    rows, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK_M)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    b = part // heads
    head = part % heads
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < rows
    g = load_tile(dout.data, offsets(dout, b, head, row, UNIT), mask, DV, BLOCK_DV)
    o = load_tile(out.data, offsets(out, b, head, row, UNIT), mask, DV, BLOCK_DV)
    result = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    at = part * rows + row.to(tl.int64)
    if dlse is not None:
        result -= tl.load(dlse + at, mask=mask, other=0.0)
    tl.store(delta + at, result, mask=mask)


@triton.jit
def _base(lse_at, mask):
    """Return log2(e) lse, for exp2(s - base): 0 where a row sees no key (s is -inf), +inf past the
    last row."""
    lse = tl.load(lse_at, mask=mask, other=float("inf"))
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit
def _apply_dropout(x, keep, opts):
    return tl.where(keep, x * opts.dropout.scale, 0.0)


# ---- dq ------------------------------------------------------------------------------------------


@triton.jit
def _along_keys(
    dq, q, dout, base, delta, k, v, lo, hi, keys, rows, query, b, head, opts,
    SHAPE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS k of the keys lo .. hi to dq (M, D)."""
    for start in tl.range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        mask = j < keys
        k_at = row_offsets(k, j, SHAPE.UNIT)
        key = load_tile(k.data, k_at, mask, SHAPE.D, SHAPE.BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        s, derivative = scores(s, opts.scale, rows, j, keys, opts, MASKED)
        p = tl.exp2(s - base[:, None])
        v_at = row_offsets(v, j, SHAPE.UNIT)
        value = load_tile(v.data, v_at, mask, SHAPE.DV, SHAPE.BLOCK_DV, MASKED)
        dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
        if opts.dropout is not None:
            keep = dropout_mask(opts.dropout, b, head, query, start, BLOCK_N)
            dp = _apply_dropout(dp, keep, opts)
        ds = p * (dp - delta[:, None]) * derivative
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@jit(*LENGTHS)
def _dq(
    q,  # RowTensor of D elements
    k,  # RowTensor of D elements
    v,  # RowTensor of DV elements
    dout,  # RowTensor of DV elements
    lse,  # (B, H, S), packed (H, total_q)
    delta,  # like lse
    dq,  # RowTensor of D elements
    bias,  # Bias or None
    cu_seqlens,  # CuSeqlens or None
    opts,  # ScoreOptions
    sizes,  # Sizes
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) % sizes.slots
    head = (tl.program_id(0) // sizes.slots).to(tl.int64)
    b, first, row, queries, key_row, keys = locate(slot, sizes, cu_seqlens, 1, BLOCK_M)
    if first >= queries:
        return
    query = first + tl.arange(0, BLOCK_M)
    mask = query < queries
    q_at = offsets(q, b, head, row + query, SHAPE.UNIT)
    q_tile = load_tile(q.data, q_at, mask, SHAPE.D, SHAPE.BLOCK_D)
    g_at = offsets(dout, b, head, row + query, SHAPE.UNIT)
    g = load_tile(dout.data, g_at, mask, SHAPE.DV, SHAPE.BLOCK_DV)
    k = head_rows(k, b, head // SHAPE.GROUP, key_row, SHAPE.UNIT)
    v = head_rows(v, b, head // SHAPE.GROUP, key_row, SHAPE.UNIT)
    lse_at = lse_row(sizes, b, head, row + query)
    base = _base(lse + lse_at, mask)
    delta_tile = tl.load(delta + lse_at, mask=mask, other=0.0)
    shift = keys - queries
    slope = None
    if opts.alibi_slopes is not None:
        slope = tl.load(opts.alibi_slopes + head) * LOG2E
    bias_tile = None
    if bias is not None:
        bias_tile = bias_rows(head_bias(bias, b, head), query, mask, sizes, 1)
    rows = ScoreRows((query + shift)[:, None], slope, bias_tile)

    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    earliest = first + shift
    latest = tl.minimum(first + BLOCK_M, queries) - 1 + shift
    edges = key_edges(earliest, latest, keys, 0, 1, opts, SHAPE, BLOCK_N)
    FIRST_PART: tl.constexpr = SHAPE.FIRST_PART
    for part in tl.static_range(FIRST_PART, 3):
        result = _along_keys(
            result, q_tile, g, base, delta_tile, k, v, edges[part], edges[part + 1], keys, rows,
            query, b, head, opts, SHAPE, BLOCK_N, part != 1,
        )  # fmt: skip
    dq_at = offsets(dq, b, head, row + query, SHAPE.UNIT)
    store_tile(dq.data, dq_at, result * opts.scale, mask, SHAPE.D, SHAPE.BLOCK_D)


# ---- dk and dv -----------------------------------------------------------------------------------


@triton.jit
def _row_edges(
    first, keys, queries, shift, opts,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the edges of three parts of the rows that see any key of the block at `first`: masked
    (causal); rows that see all keys of the block; masked (window)."""
    last = tl.minimum(first + BLOCK_N, keys) - 1
    lo = queries * 0
    hi = queries
    full_lo = lo
    full_hi = queries
    if opts.causal is not None:
        lo = tl.maximum(first - shift, 0)
        full_lo = tl.maximum(last - shift, lo)
    if opts.window is not None:
        hi = tl.minimum(queries, last + opts.window - shift)
        full_hi = tl.minimum(queries, first + opts.window - shift)
    # tiles are counted from lo: the first part ends at the start of a tile
    full_lo = tl.minimum(lo + tl.cdiv(full_lo - lo, BLOCK_M) * BLOCK_M, tl.maximum(hi, lo))
    full_hi = full_lo + tl.maximum(full_hi - full_lo, 0) // BLOCK_M * BLOCK_M
    if opts.window is None:
        full_hi = hi
    if SHAPE.LAST_PART == 0:
        full_lo = hi
    return lo, full_lo, full_hi, hi


@triton.jit
def _along_rows(
    dk, dv, k, v, q, dout, lse, delta, lo, hi, queries, keys, j, shift, slope, bias, b, head,
    start_j, opts, sizes,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of rows lo .. hi of one query head to dk (N, D) and dv (N, DV)."""
    for start in tl.range(lo, hi, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        mask = query < queries
        q_at = row_offsets(q, query, SHAPE.UNIT)
        q_tile = load_tile(q.data, q_at, mask, SHAPE.D, SHAPE.BLOCK_D)
        base = _base(lse + query.to(tl.int64), mask)
        s = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        bias_tile = None
        if bias is not None:
            bias_tile = bias_rows(bias, query, mask, sizes, 0)
        rows = ScoreRows((query + shift)[None, :], slope, bias_tile)
        s, derivative = scores(s, opts.scale, rows, j, keys, opts, MASKED, 0)
        p = tl.exp2(s - base[None, :])
        g_at = row_offsets(dout, query, SHAPE.UNIT)
        g = load_tile(dout.data, g_at, mask, SHAPE.DV, SHAPE.BLOCK_DV)
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")
        dropped = p
        if opts.dropout is not None:
            keep = tl.trans(dropout_mask(opts.dropout, b, head, query, start_j, BLOCK_N))
            dropped = _apply_dropout(p, keep, opts)
            dp = _apply_dropout(dp, keep, opts)
        dv = tl.dot(dropped.to(g.dtype), g, dv, input_precision="ieee")
        delta_tile = tl.load(delta + query.to(tl.int64), mask=mask, other=0.0)
        ds = p * (dp - delta_tile[None, :]) * derivative
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@jit(*LENGTHS)
def _dkdv(
    q, k, v, dout, lse, delta,  # as in `_dq`
    dk,  # RowTensor of D elements
    dv,  # RowTensor of DV elements
    bias, cu_seqlens, opts, sizes,  # as in `_dq`
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) % sizes.slots
    kv_head = (tl.program_id(0) // sizes.slots).to(tl.int64)
    b, first, key_row, keys, row, queries = locate(slot, sizes, cu_seqlens, 1, BLOCK_N, True)
    if first >= keys:
        return
    wide_b = b.to(tl.int64)
    j = first + tl.arange(0, BLOCK_N)
    mask = j < keys
    k_at = offsets(k, wide_b, kv_head, key_row + j, SHAPE.UNIT)
    k_tile = load_tile(k.data, k_at, mask, SHAPE.D, SHAPE.BLOCK_D)
    v_at = offsets(v, wide_b, kv_head, key_row + j, SHAPE.UNIT)
    v_tile = load_tile(v.data, v_at, mask, SHAPE.DV, SHAPE.BLOCK_DV)

    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    FIRST_PART: tl.constexpr = SHAPE.FIRST_PART
    END_PART: tl.constexpr = SHAPE.LAST_PART + 1
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    shift = keys - queries
    edges = _row_edges(first, keys, queries, shift, opts, SHAPE, BLOCK_M, BLOCK_N)
    for h in tl.range(kv_head * SHAPE.GROUP, kv_head * SHAPE.GROUP + SHAPE.GROUP):
        head = kv_head * 0 + h  # in the interpreter h is a Python int
        at = lse_row(sizes, wide_b, head, row)
        slope = None
        if opts.alibi_slopes is not None:
            slope = tl.load(opts.alibi_slopes + head) * LOG2E
        bias_of_head = None
        if bias is not None:
            bias_of_head = head_bias(bias, wide_b, head)
        for part in tl.static_range(FIRST_PART, END_PART):
            dk_tile, dv_tile = _along_rows(
                dk_tile, dv_tile, k_tile, v_tile, head_rows(q, wide_b, head, row, SHAPE.UNIT),
                head_rows(dout, wide_b, head, row, SHAPE.UNIT), lse + at, delta + at,
                edges[part], edges[part + 1], queries, keys, j, shift, slope, bias_of_head, b, head,
                first, opts, sizes, SHAPE, BLOCK_M, BLOCK_N, part != 1,
            )  # fmt: skip
    dk_at = offsets(dk, wide_b, kv_head, key_row + j, SHAPE.UNIT)
    store_tile(dk.data, dk_at, dk_tile * opts.scale, mask, SHAPE.D, SHAPE.BLOCK_D)
    dv_at = offsets(dv, wide_b, kv_head, key_row + j, SHAPE.UNIT)
    store_tile(dv.data, dv_at, dv_tile, mask, SHAPE.DV, SHAPE.BLOCK_DV)


# ---- dbias ---------------------------------------------------------------------------------------


@triton.jit
def _add_head(
    dbias, q, k, v, dout, lse, delta, tile_m, tile_n, queries, keys, slope, bias, b, head, opts,
    sizes, SHAPE: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add dS of one sequence and head to dbias (M, N).

    dS is that of the tile, and also of all tiles after it along the rows or keys over which the
    bias is broadcast.
    """
    shift = keys - queries
    m_end = tl.minimum(tile_m + BLOCK_M, queries)
    if ALL_ROWS:
        m_end = queries
    for m in tl.range(tile_m, m_end, BLOCK_M):
        query = m + tl.arange(0, BLOCK_M)
        mask = query < queries
        q_at = row_offsets(q, query, SHAPE.UNIT)
        q_tile = load_tile(q.data, q_at, mask, SHAPE.D, SHAPE.BLOCK_D)
        g_at = row_offsets(dout, query, SHAPE.UNIT)
        g = load_tile(dout.data, g_at, mask, SHAPE.DV, SHAPE.BLOCK_DV)
        base = _base(lse + query.to(tl.int64), mask)
        delta_tile = tl.load(delta + query.to(tl.int64), mask=mask, other=0.0)
        bias_tile = bias_rows(bias, query, mask, sizes, 1)
        rows = ScoreRows((query + shift)[:, None], slope, bias_tile)
        n_first = tile_n
        n_end = tl.minimum(tile_n + BLOCK_N, keys)
        if ALL_KEYS:
            n_end = keys
        if opts.causal is not None:
            n_end = tl.minimum(n_end, tl.minimum(m + BLOCK_M, queries) + shift)
        if opts.window is not None:
            unseen = tl.maximum(m + shift - opts.window + 1 - n_first, 0) // BLOCK_N
            n_first += unseen * BLOCK_N
        for n in tl.range(n_first, n_end, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            k_at = row_offsets(k, j, SHAPE.UNIT)
            key = load_tile(k.data, k_at, j < keys, SHAPE.D, SHAPE.BLOCK_D)
            v_at = row_offsets(v, j, SHAPE.UNIT)
            value = load_tile(v.data, v_at, j < keys, SHAPE.DV, SHAPE.BLOCK_DV)
            s = tl.dot(q_tile, tl.trans(key), input_precision="ieee")
            s, _ = scores(s, opts.scale, rows, j, keys, opts, True)
            p = tl.exp2(s - base[:, None])
            dp = tl.dot(g, tl.trans(value), input_precision="ieee")
            if opts.dropout is not None:
                keep = dropout_mask(opts.dropout, b, head, query, n, BLOCK_N)
                dp = _apply_dropout(dp, keep, opts)
            dbias += p * (dp - delta_tile[:, None])
    return dbias


@jit(*LENGTHS)
def _dbias(
    q, k, v, dout, lse, delta,  # as in `_dq`
    dbias,  # (batches, bias_heads, rows, columns) float32, contiguous; each may be 1
    opts, sizes, bias, cu_seqlens,  # as in `_dq`
    heads, batches, bias_heads, rows, columns,
    SHAPE: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile of dbias. ALL_ROWS, ALL_KEYS: an element is a sum over all rows, all keys."""
    task = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile_n = task % column_tiles * BLOCK_N
    tile_m = task // column_tiles % row_tiles * BLOCK_M
    part = task // column_tiles // row_tiles
    bias_head = part % bias_heads
    bias_batch = part // bias_heads
    first_b = bias_batch
    last_b = bias_batch + 1
    if batches != sizes.sequences:
        first_b = bias_batch * 0
        last_b = first_b + sizes.sequences
    first_head = bias_head
    last_head = bias_head + 1
    if bias_heads != heads:
        first_head = bias_head * 0
        last_head = first_head + heads
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = task * 0
    key_row = row
    queries = sizes.queries
    keys = sizes.keys
    for b in tl.range(first_b, last_b):
        wide_b = (task * 0 + b).to(tl.int64)  # in the interpreter b is a Python int
        if cu_seqlens is not None:
            row, queries = sequence(cu_seqlens.cu_q, b, sizes.queries)
            key_row, keys = sequence(cu_seqlens.cu_k, b, sizes.keys)
        for head in tl.range(first_head, last_head):
            wide_head = wide_b * 0 + head
            kv_head = wide_head // SHAPE.GROUP
            at = lse_row(sizes, wide_b, wide_head, row)
            slope = None
            if opts.alibi_slopes is not None:
                slope = tl.load(opts.alibi_slopes + head) * LOG2E
            result = _add_head(
                result, head_rows(q, wide_b, wide_head, row, SHAPE.UNIT),
                head_rows(k, wide_b, kv_head, key_row, SHAPE.UNIT),
                head_rows(v, wide_b, kv_head, key_row, SHAPE.UNIT),
                head_rows(dout, wide_b, wide_head, row, SHAPE.UNIT), lse + at, delta + at, tile_m,
                tile_n, queries, keys, slope,
                head_bias(bias, wide_b, wide_head), b, head, opts, sizes, SHAPE,
                ALL_ROWS, ALL_KEYS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    at = dbias + part.to(tl.int64) * rows * columns
    m = tile_m + tl.arange(0, BLOCK_M)
    n = tile_n + tl.arange(0, BLOCK_N)
    if ALL_ROWS and ALL_KEYS:
        tl.store(at, tl.sum(tl.sum(result, 1), 0))
    elif ALL_ROWS:
        tl.store(at + n, tl.sum(result, 0), mask=n < columns)
    elif ALL_KEYS:
        tl.store(at + m, tl.sum(result, 1), mask=m < rows)
    else:
        at += m.to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(at, result, mask=(m < rows)[:, None] & (n < columns)[None, :])


# ---- tile sizes ----------------------------------------------------------------------------------


def _tiles(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


# As in attention_forward.py
_DELTA_ELEMENTS = 2048  # elements of each operand: 16 per thread of four warps
_DQ = TileConfigs(
    "attention dq",
    {
        (2, 64): {80: _tiles(128, 64, 8, 2)},
        (2, 64, OPTIONS): {80: _tiles(128, 32, 8, 1)},
        (2, 128): {
            80: _tiles(128, 32, 8, 2),
            90: _tiles(128, 64, 8, 2),
            100: _tiles(128, 32, 8, 2),
        },
        (2, 128, OPTIONS): {80: _tiles(128, 32, 8, 1)},
        (2, 256): {80: _tiles(64, 32, 8, 1), 90: _tiles(32, 32, 8, 1), 100: _tiles(64, 32, 8, 1)},
        (2, 512): {80: _tiles(16, 16, 4, 1)},
        (4, 64): {80: _tiles(16, 16, 8, 1)},
        (4, 128): {80: _tiles(16, 16, 8, 2)},
        (4, 256): {80: _tiles(16, 16, 8, 2)},
        (4, 512): {80: _tiles(16, 16, 8, 2)},
    },
)
_DKDV = TileConfigs(
    "attention dk, dv",
    {
        (2, 64): {80: _tiles(32, 64, 8, 1), 90: _tiles(32, 128, 8, 2), 100: _tiles(64, 64, 8, 1)},
        (2, 64, OPTIONS): {80: _tiles(16, 128, 8, 1)},
        (2, 128): {80: _tiles(64, 64, 8, 1), 90: _tiles(16, 128, 8, 1), 100: _tiles(64, 128, 8, 1)},
        (2, 128, OPTIONS): {80: _tiles(32, 32, 8, 1)},
        (2, 256): {80: _tiles(32, 32, 8, 1)},
        (2, 512): {80: _tiles(16, 16, 8, 1)},
        (4, 64): {80: _tiles(16, 32, 8, 1)},
        (4, 128): {80: _tiles(16, 16, 8, 1)},
        (4, 256): {80: _tiles(16, 16, 8, 2)},
        (4, 512): {80: _tiles(16, 16, 8, 2)},
    },
)
_DBIAS = TileConfigs(
    "attention dbias",
    {
        (2, 64): {80: _tiles(32, 32, 8, 1)},
        (2, 128): {80: _tiles(16, 32, 8, 1), 90: _tiles(32, 32, 8, 1)},
        (2, 256): {80: _tiles(16, 32, 8, 1)},
        (2, 512): {80: _tiles(16, 16, 8, 1)},
        (4, 64): {80: _tiles(32, 32, 8, 1), 90: _tiles(16, 16, 8, 1), 100: _tiles(16, 16, 8, 2)},
        (4, 128): {80: _tiles(32, 32, 8, 1), 90: _tiles(16, 16, 8, 1), 100: _tiles(32, 32, 8, 1)},
        (4, 256): {80: _tiles(16, 16, 8, 1)},
        (4, 512): {80: _tiles(16, 16, 8, 1)},
    },
)


# ---- host ----------------------------------------------------------------------------------------


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dims: Dims, layout: SequenceLayout, sinks: Tensor | None,
    bias: Tensor | None, options: ScoreOptions, bias_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill dq, dk and dv, and return dsinks and dbias, empty where there are none.

    `dims` are the dimensions of sequence, head and row.
    """
    heads, kv_heads = q.shape[dims[1]], k.shape[dims[1]]
    width, v_width = q.shape[-1], v.shape[-1]
    block_d, block_dv = padded_width(width), padded_width(v_width)
    group = heads // kv_heads if kv_heads else 1
    with_options = needs_registers(bias, options)
    bias_strides, bias_size = bias_tensor(bias)
    inputs = ((q, dims), (k, dims), (v, dims), (dout, dims))

    def tiles(table: TileConfigs) -> Config:
        return select_config(table, q, max(block_d, block_dv), with_options)

    def sizes(blocks: int, slots: int) -> Sizes:
        lengths = layout.sequences, layout.queries, layout.keys
        return Sizes(*lengths, blocks, slots, *layout.lse_strides(heads), *bias_size)

    def shape(unit: int, first: int = 0, last: int = 2) -> AttentionShape:
        return AttentionShape(
            width, v_width, block_d, block_dv, group, unit, FIRST_PART=first, LAST_PART=last
        )

    # for delta, all packed rows count as one sequence
    delta = torch.empty_like(lse)
    unit, rows = row_tensors((dout, dims), (out, dims))
    config = Config({"BLOCK_M": max(1, _DELTA_ELEMENTS // block_dv)}, num_warps=4)
    blocks = triton.cdiv(layout.queries, config.sizes["BLOCK_M"])
    parts = heads * (1 if layout.cu_seqlens else layout.sequences)
    launch(
        _delta, (blocks * parts,), *rows, contiguous_float(dlse), delta, layout.queries, heads,
        config=config, DV=v_width, BLOCK_DV=block_dv, UNIT=unit,
    )  # fmt: skip

    config = tiles(_DQ)
    unit, (*rows, dq_rows) = row_tensors(*inputs, (dq, dims))
    blocks, slots = layout.slots(layout.queries, config.sizes["BLOCK_M"])
    launch(
        _dq, (slots * heads if layout.queries else 0,), *rows, lse, delta, dq_rows, bias_strides,
        layout.cu_seqlens, options, sizes(blocks, slots), config=config,
        SHAPE=shape(unit, first_part(options)),
    )  # fmt: skip

    if options.dropout:  # one masked part, as in `first_part`
        edges = 0, 0
    else:
        edges = 0 if options.causal else 1, 2 if options.window else 1
    config = tiles(_DKDV)
    unit, (*rows, dk_rows, dv_rows) = row_tensors(*inputs, (dk, dims), (dv, dims))
    blocks, slots = layout.slots(layout.keys, config.sizes["BLOCK_N"])
    launch(
        _dkdv, (slots * kv_heads if layout.keys else 0,), *rows, lse, delta, dk_rows, dv_rows,
        bias_strides, layout.cu_seqlens, options, sizes(blocks, slots), config=config,
        SHAPE=shape(unit, *edges),
    )  # fmt: skip

    dbias = lse.new_empty(0)
    if bias is not None and bias_grad:
        dbias = lse.new_empty(bias.shape)
        config = tiles(_DBIAS)
        batches, bias_heads, bias_queries, columns = bias.shape
        programs = batches * bias_heads * triton.cdiv(bias_queries, config.sizes["BLOCK_M"])
        programs *= triton.cdiv(columns, config.sizes["BLOCK_N"])
        unit, rows = row_tensors(*inputs)
        launch(
            _dbias, (programs,), *rows, lse, delta, dbias, options, sizes(0, 0), bias_strides,
            layout.cu_seqlens, heads, *dbias.shape, config=config, SHAPE=shape(unit),
            ALL_ROWS=bias_queries == 1, ALL_KEYS=columns == 1,
        )  # fmt: skip

    dsinks = lse.new_empty(0)
    if sinks is not None:
        weight = torch.exp(sinks.float()[:, None] - lse) * delta  # (B, H, S) or (H, total_q)
        dsinks = -weight.masked_fill(lse == -torch.inf, 0).transpose(-2, 0).flatten(1).sum(1)
    return dsinks, dbias
