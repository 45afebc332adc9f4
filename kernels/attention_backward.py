"""dq, dk, dv, dsinks and dbias of attention, from out and lse: scores are recomputed.

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
beyond itself; a bias with few elements runs few programs. A program reads its own operands once,
and once those that it walks along (mostly from L2). None of this has been measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.attention import (
    LENGTHS,
    LOG2E,
    OPTIONS,
    Layout,
    Options,
    bias_arguments,
    dense,
    in_units,
    kept,
    load_rows,
    options,
    padded,
    place,
    scores,
    seen_keys,
    sequence,
    sizes_of,
    store_rows,
    strides,
    whole_tiles,
)
from fastlm.kernels.launch import Config, Tiles, launch
from fastlm.memory_order import elements_last
from fastlm.reference import AttentionOptions


@triton.jit(do_not_specialize=LENGTHS)
def _delta(
    dout,  # rows of DV elements, strides dout_batch, dout_head, dout_row
    out,  # likewise
    dlse,  # (B, H, rows) float32 or None
    delta,  # (B, H, rows) float32
    rows, heads, dout_batch, dout_head, dout_row, out_batch, out_head, out_row,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK_M)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    b = part // heads
    head = part % heads
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = row < rows
    wide_row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK_DV)
    dout_at = dout + (b * dout_batch + head * dout_head + wide_row * dout_row)[:, None] * UNIT
    out_at = out + (b * out_batch + head * out_head + wide_row * out_row)[:, None] * UNIT
    g = load_rows(dout_at + columns[None, :], columns, seen, DV, BLOCK_DV, True)
    o = load_rows(out_at + columns[None, :], columns, seen, DV, BLOCK_DV, True)
    result = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if dlse is not None:
        result -= tl.load(dlse + part * rows + wide_row, mask=seen, other=0.0)
    tl.store(delta + part * rows + wide_row, result, mask=seen)


@triton.jit
def _base(lse_at, seen):
    """log2(e) lse, for exp2(s - base): 0 where a row sees nothing (s is -inf), +inf past the last
    row."""
    lse = tl.load(lse_at, mask=seen, other=float("inf"))
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit
def _along_keys(
    dq, q, dout, base, delta, k, v, seed, bias, lo, hi, keys, i, query, seen_bias, slope, b, head,
    key_columns, value_columns, k_row, v_row, bias_key, bias_keys,
    scale, softcap, window, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS k of the keys lo .. hi to dq (M, D)."""
    for start in tl.range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        wide_j = j.to(tl.int64)
        k_at = k + (wide_j * k_row * UNIT)[:, None] + key_columns[None, :]
        key = load_rows(k_at, key_columns, j < keys, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        s, derivative = scores(
            s, i[:, None], j[None, :], scale, softcap, slope, bias[:, None], bias_key,
            seen_bias[:, None] & (j < bias_keys)[None, :], window, keys,
            SOFTCAP, ALIBI, BIAS, CAUSAL, WINDOW, MASKED,
        )  # fmt: skip
        p = tl.exp2(s - base[:, None])
        v_at = v + (wide_j * v_row * UNIT)[:, None] + value_columns[None, :]
        value = load_rows(v_at, value_columns, j < keys, DV, BLOCK_DV, MASKED)
        dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
        if DROPOUT:
            keep = kept(seed, threshold, b, head, query, start, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * derivative
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def _dq(
    q,  # strides q_batch, q_head, q_row
    k,
    v,
    dout,  # rows of DV elements
    lse,  # (B, H, S), varlen (H, total_q); delta likewise
    delta,
    dq,
    slopes,  # as in `attention._forward`
    bias,
    seed,
    cu_q,
    cu_k,
    blocks, queries, keys, sequences, slots, total_q, total_k,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row, lse_batch, lse_head,
    bias_batch, bias_head, bias_row, bias_key, bias_rows, bias_keys,
    scale, softcap, window, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FIRST_PART: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) % slots
    head = (tl.program_id(0) // slots).to(tl.int64)
    b, first, row, queries, key_row, keys = place(
        slot, blocks, queries, keys, cu_q, cu_k, total_q, total_k, sequences, 1, BLOCK_M, VARLEN,
        True,  # causal: the blocks with the most keys first
    )  # fmt: skip
    if first >= queries:
        return
    wide_b = b.to(tl.int64)
    query = first + tl.arange(0, BLOCK_M)
    seen_rows = query < queries
    wide_row = (row + query).to(tl.int64)
    key_columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    q_at = q + (wide_b * q_batch + head * q_head + wide_row * q_row)[:, None] * UNIT
    q_tile = load_rows(q_at + key_columns[None, :], key_columns, seen_rows, D, BLOCK_D, True)
    dout_at = dout + (wide_b * dout_batch + head * dout_head + wide_row * dout_row)[:, None] * UNIT
    g = load_rows(dout_at + value_columns[None, :], value_columns, seen_rows, DV, BLOCK_DV, True)
    kv_head = head // GROUP
    wide_key = key_row.to(tl.int64)
    k += (wide_b * k_batch + kv_head * k_head + wide_key * k_row) * UNIT
    v += (wide_b * v_batch + kv_head * v_head + wide_key * v_row) * UNIT
    lse_row = wide_b * lse_batch + head * lse_head + wide_row
    base = _base(lse + lse_row, seen_rows)
    delta_tile = tl.load(delta + lse_row, mask=seen_rows, other=0.0)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head) * LOG2E
    bias_at = seen_rows
    seen_bias = seen_rows
    if bias is not None:
        bias_at = bias + wide_b * bias_batch + head * bias_head + query.to(tl.int64) * bias_row
        seen_bias = seen_rows & (query < bias_rows)

    # the keys that the rows see, as in `attention._forward`
    shift = keys - queries
    earliest = first + shift
    latest = tl.minimum(first + BLOCK_M, queries) - 1 + shift
    lo, hi = seen_keys(earliest, latest, keys, window, BLOCK_N, CAUSAL, WINDOW)
    full_lo, full_hi = whole_tiles(
        lo, hi, earliest, latest, window, BLOCK_N, CAUSAL, WINDOW, FIRST_PART
    )
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(FIRST_PART, 3):
        if part == 0:
            start = lo
            end = full_lo
        elif part == 1:
            start = full_lo
            end = full_hi
        else:
            start = full_hi
            end = hi
        result = _along_keys(
            result, q_tile, g, base, delta_tile, k, v, seed, bias_at, start, end, keys,
            query + shift, query, seen_bias, slope, b, head, key_columns, value_columns,
            k_row, v_row, bias_key, bias_keys, scale, softcap, window, threshold, keep_scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, UNIT, SOFTCAP, slopes is not None,
            bias is not None, seed is not None, CAUSAL, WINDOW, part != 1,
        )  # fmt: skip
    dq_at = dq + (wide_b * dq_batch + head * dq_head + wide_row * dq_row)[:, None] * UNIT
    store_rows(dq_at + key_columns[None, :], result * scale, key_columns, seen_rows, D, BLOCK_D)


@triton.jit
def _along_rows(
    dk, dv, k, v, q, dout, lse, delta, seed, bias, lo, hi, queries, keys, j, shift, slope, b, head,
    start_j, key_columns, value_columns, q_row, dout_row, bias_row, bias_key, bias_rows, bias_keys,
    scale, softcap, window, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of rows lo .. hi of one query head to dk (N, D) and dv (N, DV). Tiles of
    scores are keys x rows."""
    for start in tl.range(lo, hi, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        seen_rows = query < queries
        wide_query = query.to(tl.int64)
        q_at = q + (wide_query * q_row * UNIT)[:, None] + key_columns[None, :]
        q_tile = load_rows(q_at, key_columns, seen_rows, D, BLOCK_D, True)
        base = _base(lse + wide_query, seen_rows)
        s = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        bias_at = seen_rows
        seen_bias = seen_rows
        if BIAS:
            bias_at = bias + wide_query * bias_row
            seen_bias = seen_rows & (query < bias_rows)
        s, derivative = scores(
            s, (query + shift)[None, :], j[:, None], scale, softcap, slope, bias_at[None, :],
            bias_key, seen_bias[None, :] & (j < bias_keys)[:, None], window, keys,
            SOFTCAP, ALIBI, BIAS, CAUSAL, WINDOW, MASKED,
        )  # fmt: skip
        p = tl.exp2(s - base[None, :])
        g_at = dout + (wide_query * dout_row * UNIT)[:, None] + value_columns[None, :]
        g = load_rows(g_at, value_columns, seen_rows, DV, BLOCK_DV, True)
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")
        dropped = p
        if DROPOUT:
            keep = tl.trans(kept(seed, threshold, b, head, query, start_j, BLOCK_N))
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(g.dtype), g, dv, input_precision="ieee")
        delta_tile = tl.load(delta + wide_query, mask=seen_rows, other=0.0)
        ds = p * (dp - delta_tile[None, :]) * derivative
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _dkdv(
    q, k, v, dout, lse, delta,  # as in `_dq`
    dk,  # strides dk_batch, dk_head, dk_row
    dv,
    slopes, bias, seed, cu_q, cu_k,
    blocks, queries, keys, sequences, slots, total_q, total_k,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    lse_batch, lse_head,
    bias_batch, bias_head, bias_row, bias_key, bias_rows, bias_keys,
    scale, softcap, window, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FIRST_PART: tl.constexpr, LAST_PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) % slots
    kv_head = (tl.program_id(0) // slots).to(tl.int64)
    b, first, key_row, keys, row, queries = place(
        slot, blocks, keys, queries, cu_k, cu_q, total_k, total_q, sequences, 1, BLOCK_N, VARLEN,
        False,
    )  # fmt: skip
    if first >= keys:
        return
    wide_b = b.to(tl.int64)
    j = first + tl.arange(0, BLOCK_N)
    inside = j < keys
    wide_key = (key_row + j).to(tl.int64)
    key_columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    k_at = k + (wide_b * k_batch + kv_head * k_head + wide_key * k_row)[:, None] * UNIT
    k_tile = load_rows(k_at + key_columns[None, :], key_columns, inside, D, BLOCK_D, True)
    v_at = v + (wide_b * v_batch + kv_head * v_head + wide_key * v_row)[:, None] * UNIT
    v_tile = load_rows(v_at + value_columns[None, :], value_columns, inside, DV, BLOCK_DV, True)

    # rows that see any of the keys, in up to three parts: lo .. full_lo, masked (causal);
    # full_lo .. full_hi, which see all of the keys; full_hi .. hi, masked (window)
    shift = keys - queries
    last = tl.minimum(first + BLOCK_N, keys) - 1
    lo = queries * 0
    hi = queries
    full_lo = lo
    full_hi = queries
    if CAUSAL:
        lo = tl.maximum(first - shift, 0)
        full_lo = tl.maximum(last - shift, lo)
    if WINDOW:
        hi = tl.minimum(queries, last + window - shift)
        full_hi = tl.minimum(queries, first + window - shift)
    # tiles are counted from lo: the first part ends at the start of a tile
    full_lo = tl.minimum(lo + tl.cdiv(full_lo - lo, BLOCK_M) * BLOCK_M, tl.maximum(hi, lo))
    full_hi = full_lo + tl.maximum(full_hi - full_lo, 0) // BLOCK_M * BLOCK_M
    if not WINDOW:
        full_hi = hi
    if LAST_PART == 0:
        full_lo = hi

    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in tl.range(kv_head * GROUP, kv_head * GROUP + GROUP):
        q_of = q + (wide_b * q_batch + head * q_head + row.to(tl.int64) * q_row) * UNIT
        g_of = dout + (wide_b * dout_batch + head * dout_head + row.to(tl.int64) * dout_row) * UNIT
        lse_row = wide_b * lse_batch + head * lse_head + row
        slope = 0.0
        if slopes is not None:
            slope = tl.load(slopes + head) * LOG2E
        bias_of = bias
        if bias is not None:
            bias_of = bias + wide_b * bias_batch + head * bias_head
        for part in tl.static_range(FIRST_PART, LAST_PART + 1):
            if part == 0:
                start = lo
                end = full_lo
            elif part == 1:
                start = full_lo
                end = full_hi
            else:
                start = full_hi
                end = hi
            dk_tile, dv_tile = _along_rows(
                dk_tile, dv_tile, k_tile, v_tile, q_of, g_of, lse + lse_row, delta + lse_row, seed,
                bias_of, start, end, queries, keys, j, shift, slope, b, head, first,
                key_columns, value_columns, q_row, dout_row, bias_row, bias_key, bias_rows,
                bias_keys, scale, softcap, window, threshold, keep_scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, UNIT, SOFTCAP, slopes is not None,
                bias is not None, seed is not None, CAUSAL, WINDOW, part != 1,
            )  # fmt: skip
    dk_at = dk + (wide_b * dk_batch + kv_head * dk_head + wide_key * dk_row)[:, None] * UNIT
    store_rows(dk_at + key_columns[None, :], dk_tile * scale, key_columns, inside, D, BLOCK_D)
    dv_at = dv + (wide_b * dv_batch + kv_head * dv_head + wide_key * dv_row)[:, None] * UNIT
    store_rows(dv_at + value_columns[None, :], dv_tile, value_columns, inside, DV, BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def _dbias(
    q, k, v, dout, lse, delta,  # as in `_dq`
    dbias,  # (batches, bias_heads, rows, columns) float32, contiguous
    slopes, bias, seed, cu_q, cu_k,
    queries, keys, sequences, heads, total_q, total_k, batches, bias_heads, rows, columns,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, lse_batch, lse_head,
    bias_batch, bias_head, bias_row, bias_key, bias_rows, bias_keys,
    scale, softcap, window, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile of dbias. ALL_ROWS, ALL_KEYS: an element is a sum over all rows, all keys."""
    task = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile_n = task % column_tiles * BLOCK_N
    tile_m = task // column_tiles % row_tiles * BLOCK_M
    part = task // column_tiles // row_tiles
    one_head = part % bias_heads
    one_batch = part // bias_heads
    first_batch = one_batch
    last_batch = one_batch + 1
    if batches != sequences:
        first_batch = one_batch * 0
        last_batch = first_batch + sequences
    first_head = one_head
    last_head = one_head + 1
    if bias_heads != heads:
        first_head = one_head * 0
        last_head = first_head + heads
    key_columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = task * 0
    key_row = row
    for b in tl.range(first_batch, last_batch):
        wide_b = (task * 0 + b).to(tl.int64)  # in the interpreter b is a Python int
        if VARLEN:
            row, queries = sequence(cu_q, b, total_q)
            key_row, keys = sequence(cu_k, b, total_k)
        shift = keys - queries
        wide_row = row.to(tl.int64)
        wide_key = key_row.to(tl.int64)
        m_end = tl.minimum(tile_m + BLOCK_M, queries)
        if ALL_ROWS:
            m_end = queries
        for head in tl.range(first_head, last_head):
            wide_head = wide_b * 0 + head
            kv_head = wide_head // GROUP
            q_of = q + (wide_b * q_batch + wide_head * q_head + wide_row * q_row) * UNIT
            g_of = dout + (wide_b * dout_batch + wide_head * dout_head + wide_row * dout_row) * UNIT
            k_of = k + (wide_b * k_batch + kv_head * k_head + wide_key * k_row) * UNIT
            v_of = v + (wide_b * v_batch + kv_head * v_head + wide_key * v_row) * UNIT
            lse_row = wide_b * lse_batch + wide_head * lse_head + wide_row
            slope = 0.0
            if slopes is not None:
                slope = tl.load(slopes + head) * LOG2E
            bias_of = bias + wide_b * bias_batch + wide_head * bias_head
            for m in tl.range(tile_m, m_end, BLOCK_M):
                query = m + tl.arange(0, BLOCK_M)
                seen_rows = query < queries
                wide_query = query.to(tl.int64)
                q_at = q_of + (wide_query * q_row * UNIT)[:, None] + key_columns[None, :]
                q_tile = load_rows(q_at, key_columns, seen_rows, D, BLOCK_D, True)
                g_at = g_of + (wide_query * dout_row * UNIT)[:, None] + value_columns[None, :]
                g = load_rows(g_at, value_columns, seen_rows, DV, BLOCK_DV, True)
                base = _base(lse + lse_row + wide_query, seen_rows)
                delta_tile = tl.load(delta + lse_row + wide_query, mask=seen_rows, other=0.0)
                n_first = tile_n
                n_end = tl.minimum(tile_n + BLOCK_N, keys)
                if ALL_KEYS:
                    n_end = keys
                if CAUSAL:
                    n_end = tl.minimum(n_end, tl.minimum(m + BLOCK_M, queries) + shift)
                if WINDOW:
                    unseen = tl.maximum(m + shift - window + 1 - n_first, 0) // BLOCK_N
                    n_first += unseen * BLOCK_N
                for n in tl.range(n_first, n_end, BLOCK_N):
                    j = n + tl.arange(0, BLOCK_N)
                    inside = j < keys
                    wide_j = j.to(tl.int64)
                    k_at = k_of + (wide_j * k_row * UNIT)[:, None] + key_columns[None, :]
                    key = load_rows(k_at, key_columns, inside, D, BLOCK_D, True)
                    v_at = v_of + (wide_j * v_row * UNIT)[:, None] + value_columns[None, :]
                    value = load_rows(v_at, value_columns, inside, DV, BLOCK_DV, True)
                    s = tl.dot(q_tile, tl.trans(key), input_precision="ieee")
                    s, _ = scores(
                        s, (query + shift)[:, None], j[None, :], scale, softcap, slope,
                        (bias_of + wide_query * bias_row)[:, None], bias_key,
                        (seen_rows & (query < bias_rows))[:, None] & (j < bias_keys)[None, :],
                        window, keys, SOFTCAP, slopes is not None, True, CAUSAL, WINDOW, True,
                    )  # fmt: skip
                    p = tl.exp2(s - base[:, None])
                    dp = tl.dot(g, tl.trans(value), input_precision="ieee")
                    if seed is not None:
                        keep = kept(seed, threshold, b, head, query, n, BLOCK_N)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    result += p * (dp - delta_tile[:, None])
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


# As in kernels/attention.py
_DELTA_ELEMENTS = 2048  # elements of each operand: 16 per thread of four warps
_DQ = Tiles(
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
_DKDV = Tiles(
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
_DBIAS = Tiles(
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
    dq: Tensor, dk: Tensor, dv: Tensor, dims: tuple, layout: Layout, o: Options, bias_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill dq, dk and dv; return dsinks and dbias, empty where there are none. `dims`: the
    dimensions of sequence, head and row."""
    heads, kv_heads = q.shape[dims[1]], k.shape[dims[1]]
    width, v_width = q.shape[-1], v.shape[-1]
    block_d, block_dv = padded(width), padded(v_width)
    widest = max(block_d, block_dv)
    varlen = layout.cu_q is not None
    lse_steps = (0, layout.queries) if varlen else (heads * layout.queries, layout.queries)

    # for delta, all packed rows count as one sequence
    delta = torch.empty_like(lse)
    unit, steps = in_units(strides(dout, dims), strides(out, dims))
    config = Config({"BLOCK_M": max(1, _DELTA_ELEMENTS // block_dv)}, num_warps=4)
    blocks = triton.cdiv(layout.queries, config.sizes["BLOCK_M"])
    parts = heads * (1 if varlen else layout.sequences)
    launch(
        _delta, (blocks * parts,), dout, out, None if dlse is None else dlse.float().contiguous(),
        delta, layout.queries, heads, *steps, config=config, DV=v_width, BLOCK_DV=block_dv,
        UNIT=unit,
    )  # fmt: skip

    inputs = (strides(q, dims), strides(k, dims), strides(v, dims), strides(dout, dims))
    options_ = (*bias_arguments(o.bias), *o.numbers())
    tensors = (o.slopes, o.bias, o.seed, layout.cu_q, layout.cu_k)
    totals = (layout.queries, layout.keys)
    constants = dict(
        D=width, DV=v_width, BLOCK_D=block_d, BLOCK_DV=block_dv,
        GROUP=heads // kv_heads if kv_heads else 1, VARLEN=varlen, **o.flags(),
    )  # fmt: skip

    def slots(rows: int, block: int) -> tuple[int, int]:
        blocks = triton.cdiv(rows, block)
        return blocks, rows // block + layout.sequences if varlen else blocks * layout.sequences

    config = sizes_of(_DQ, q, widest, o)
    unit, steps = in_units(*inputs, strides(dq, dims))
    blocks, programs = slots(layout.queries, config.sizes["BLOCK_M"])
    launch(
        _dq, (programs * heads if layout.queries else 0,), q, k, v, dout, lse, delta, dq, *tensors,
        blocks, layout.queries, layout.keys, layout.sequences, programs, *totals,
        *steps, *lse_steps, *options_, config=config, UNIT=unit, **constants,
        **o.parts(),
    )  # fmt: skip
    if o.seed is not None:  # one masked part, as in `Options.parts`
        first_part, last_part = 0, 0
    else:
        first_part, last_part = 0 if o.causal else 1, 2 if o.window > 0 else 1
    config = sizes_of(_DKDV, q, widest, o)
    unit, steps = in_units(*inputs, strides(dk, dims), strides(dv, dims))
    blocks, programs = slots(layout.keys, config.sizes["BLOCK_N"])
    launch(
        _dkdv, (programs * kv_heads if layout.keys else 0,), q, k, v, dout, lse, delta, dk, dv,
        *tensors, blocks, layout.queries, layout.keys, layout.sequences, programs, *totals,
        *steps, *lse_steps, *options_, config=config, UNIT=unit, **constants,
        FIRST_PART=first_part, LAST_PART=last_part,
    )  # fmt: skip

    dbias = lse.new_empty(0)
    if o.bias is not None and bias_grad:
        dbias = lse.new_empty(o.bias.shape)
        config = sizes_of(_DBIAS, q, widest, o)
        batches, bias_heads, rows, columns = o.bias.shape
        tiles = triton.cdiv(rows, config.sizes["BLOCK_M"])
        tiles *= triton.cdiv(columns, config.sizes["BLOCK_N"])
        unit, steps = in_units(*inputs)
        launch(
            _dbias, (tiles * batches * bias_heads,), q, k, v, dout, lse, delta, dbias, *tensors,
            layout.queries, layout.keys, layout.sequences, heads, *totals, *dbias.shape,
            *steps, *lse_steps, *options_, config=config, UNIT=unit, ALL_ROWS=rows == 1,
            ALL_KEYS=columns == 1, **constants,
        )  # fmt: skip

    dsinks = lse.new_empty(0)
    if o.sinks is not None:
        sinks = o.sinks[:, None]
        weight = torch.exp(sinks - lse) * delta  # (B, H, S) or (H, total_q)
        dsinks = -weight.masked_fill(lse == -torch.inf, 0).transpose(-2, 0).flatten(1).sum(1)
    return dsinks, dbias


_DIMS = (0, 1, 2)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, alibi_slopes: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    numbers: AttentionOptions, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout, q, k, v, out = elements_last(dout, q, k, v, out)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    o = options(sinks, alibi_slopes, bias, seed, *numbers)
    layout = dense(q, k)
    rest = backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, _DIMS, layout, o, need_bias)
    return dq, dk, dv, *rest
