"""out = softmax(scores) v and lse, without the scores in memory (Dao et al. 2022).

Dense, packed (varlen) and paged tensors; `fastlm.reference` defines the scores. A program owns
BLOCK_M rows of one key head and walks the keys that they see, BLOCK_N at a time:

                   keys   lo      full_lo            full_hi        hi
    BLOCK_M rows    |      |masked  |  whole, unmasked  |  masked    |      split 0 | split 1 | ..
    of PACK heads   |      |------->|------------------>|----------->|

- Tiles that no row sees (after the diagonal, before the window) are skipped. Only the tiles at the
  edges of the visible range are masked.
- PACK = 1: the rows belong to one query head. Where a sequence has few rows, PACK is the number of
  query heads that share a key head: row r of a tile is query r // PACK of head r % PACK, and K and
  V are read once for all of these heads.
- With splits (few rows, many keys), the visible keys are divided among `splits` programs. Each
  writes out and lse of its share in float32; `_combine` adds the shares in the order of the splits.

q is read once, K and V once per block of rows (from L2 after the first). Scores are kept in units
of log2(e), so that exp is exp2. Products of 16-bit tensors run on the tensor cores with float32
sums, those of float32 in float32. None of this has been measured on a GPU.

Names: b is a sequence, i a query position aligned to the keys (the last query is at the last key)
and j a key. `q_row` etc. are strides in units of UNIT elements, so that the compiler knows them to
be multiples of 16 or 8 where they are.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config, Tiles, launch, multiprocessors
from fastlm.memory_order import elements_last, empty_out
from fastlm.reference import AttentionOptions

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments whose new values compile no new variant: sizes, and strides except those of a bias,
# whose last stride must be known to be 1 where it is. UNIT covers what alignment needs of the rest.
LENGTHS = (
    "blocks queries keys sequences slots total_q total_k window splits bias_rows bias_keys"
    " threshold lse_batch lse_head lse_rows table_row pages rows columns heads batches"
).split()
LENGTHS += [
    f"{t}_{step}" for t in "q k v out dout dq dk dv".split() for step in ("batch", "head", "row")
]


# ---- what the kernels of all three ops share -----------------------------------------------------


@triton.jit
def sequence(cu, b, total):
    """First row and length of packed sequence b, clamped to the tensor whatever cu contains."""
    start = tl.minimum(tl.maximum(tl.load(cu + b), 0), total)
    return start, tl.maximum(tl.minimum(tl.load(cu + b + 1), total) - start, 0)


@triton.jit
def place(
    slot, blocks, length, other_length, cu, other_cu, total, other_total, sequences,
    PACK: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """The sequence and BLOCK of a slot: b, the block's first row, and the first row and length of
    the sequence in this tensor and in the other one (keys for queries, queries for keys).

    Packed: the slots of sequence b start at cu[b] * PACK // BLOCK + b. It has at least as many
    slots as blocks, so that the grid follows from the totals. Offsets that do not rise from 0 may
    put a slot before the start of its sequence; such a slot gets no rows.
    """
    if VARLEN:
        low = slot * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            after = tl.load(cu + middle) * PACK // BLOCK + middle > slot
            low = tl.where(after, low, middle)
            high = tl.where(after, middle, high)
        b = low
        start, length = sequence(cu, b, total)
        other, other_length = sequence(other_cu, b, other_total)
        block = slot - (start * PACK // BLOCK + b)
        first = tl.where(block < 0, length * PACK, block * BLOCK)
    else:
        b = slot // blocks
        block = slot % blocks
        if LAST_FIRST:
            block = blocks - 1 - block
        first = block * BLOCK
        start = slot * 0
        other = start
    return b, first, start, length, other, other_length


@triton.jit
def seen_keys(
    earliest, latest, keys, window,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """lo and hi: the keys that any row in earliest .. latest sees; lo is a multiple of BLOCK_N."""
    lo = keys * 0
    hi = keys
    if CAUSAL:
        hi = tl.minimum(keys, latest + 1)
    if WINDOW:
        lo = tl.maximum(earliest - window + 1, 0) // BLOCK_N * BLOCK_N
    return lo, hi


@triton.jit
def whole_tiles(
    lo, hi, earliest, latest, window,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FIRST_PART: tl.constexpr,
):  # fmt: skip
    """full_lo and full_hi, multiples of BLOCK_N: the keys within lo .. hi that every row sees."""
    full_hi = hi
    if CAUSAL:
        full_hi = tl.minimum(hi, earliest + 1)
    full_hi = tl.maximum(tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N, lo)
    full_lo = lo
    if WINDOW:
        full_lo = tl.cdiv(tl.maximum(latest - window + 1, 0), BLOCK_N) * BLOCK_N
        full_lo = tl.minimum(tl.maximum(full_lo, lo), full_hi)
    if FIRST_PART == 2:
        full_hi = lo
    return full_lo, full_hi


@triton.jit
def load_rows(at, columns, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile (rows, BLOCK) whose rows have WIDTH elements. Elements past WIDTH are zero and, if
    MASKED, so are the rows where the mask `rows` is false."""
    if WIDTH == BLOCK:
        if MASKED:
            return tl.load(at, mask=rows[:, None], other=0)
        else:
            return tl.load(at)
    else:
        if MASKED:
            return tl.load(at, mask=rows[:, None] & (columns < WIDTH)[None, :], other=0)
        else:
            return tl.load(at, mask=(columns < WIDTH)[None, :], other=0)


@triton.jit
def store_rows(at, tile, columns, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if WIDTH == BLOCK:
        tl.store(at, tile.to(at.dtype.element_ty), mask=rows[:, None])
    else:
        mask = rows[:, None] & (columns < WIDTH)[None, :]
        tl.store(at, tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def scores(
    product, i, j, scale, softcap, slope, bias, bias_key, seen, window, keys,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return log2(e) times the scores of a tile of q k^T, and the derivative of the scores with
    respect to scale q k^T.

    i, slope and bias (pointers) run along one axis, j along the other: the tile may be transposed.
    """
    derivative = 1.0
    if SOFTCAP:
        # tanh, exactly odd; 1 - 2 / (e^2x + 1) would lose the digits of small x
        x = product * (scale / softcap)
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        small = x * (1.0 - x * x * (0.3333333333 - 0.1333333333 * x * x))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -t, t))
        s = t * (softcap * LOG2E)
        derivative = 1.0 - t * t
    else:
        s = product * (scale * LOG2E)
    if ALIBI:
        s -= slope * tl.abs(i - j).to(tl.float32)
    if BIAS:
        s += tl.load(bias + j.to(tl.int64) * bias_key, mask=seen, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        visible = j < keys
        if CAUSAL:
            visible = visible & (j <= i)
        if WINDOW:
            visible = visible & (j > i - window)
        s = tl.where(visible, s, float("-inf"))
    return s, derivative


@triton.jit
def kept(seed, threshold, b, head, query, start, BLOCK: tl.constexpr):
    """Which of the probabilities (query, start .. start + BLOCK) dropout keeps.

    Philox4x32-10 as in `reference.dropout_factor`: a counter's four words serve keys 16 apart.
    """
    if BLOCK >= 64:
        lanes = start // 4 + tl.arange(0, BLOCK // 4)
    else:
        lanes = start // 64 * 16 + tl.arange(0, 16)
    zero = query[:, None] * 0 + lanes[None, :] * 0
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed),
        lanes[None, :] + zero,
        query[:, None] + zero,
        (head + zero).to(tl.int32),
        b + zero,
    )
    least = threshold.to(tl.uint32, bitcast=True)
    k0 = (w0 >= least).to(tl.int8)
    k1 = (w1 >= least).to(tl.int8)
    k2 = (w2 >= least).to(tl.int8)
    k3 = (w3 >= least).to(tl.int8)
    rows: tl.constexpr = query.shape[0]
    if BLOCK >= 64:
        four = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # (rows, lanes, 2, 2): words 0 1, 2 3
        four = tl.reshape(four, (rows, BLOCK // 64, 16, 4))
        keep = tl.reshape(tl.permute(four, (0, 1, 3, 2)), (rows, BLOCK))
    else:
        upper = start // 32 % 2 == 1
        first = tl.where(upper, k2, k0)
        second = tl.where(upper, k3, k1)
        if BLOCK == 32:
            keep = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (rows, BLOCK))
        else:
            tl.static_assert(BLOCK == 16)
            keep = tl.where(start // 16 % 2 == 1, second, first)
    return keep != 0


# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def _attend(
    out, total, top, q, k, v, seed, table, bias, lo, hi, keys, i, query, seen_rows, slope, b, head,
    key_columns, value_columns, pages, k_batch, k_row, v_batch, v_row, bias_key, bias_keys,
    scale, softcap, window, threshold,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys lo .. hi to out (M, DV) and total (M), which are in units of 2^top."""
    for start in tl.range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        inside = j < keys
        if PAGE:
            page = tl.load(table + j // PAGE, mask=inside, other=0)
            page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)  # inside the cache
            slot = (j % PAGE).to(tl.int64)
            k_rows = (page * k_batch + slot * k_row) * UNIT
            v_rows = (page * v_batch + slot * v_row) * UNIT
        else:
            k_rows = j.to(tl.int64) * k_row * UNIT
            v_rows = j.to(tl.int64) * v_row * UNIT
        k_at = k + k_rows[:, None] + key_columns[None, :]
        key = load_rows(k_at, key_columns, inside, D, BLOCK_D, MASKED).to(q.dtype)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        s, _ = scores(
            s, i[:, None], j[None, :], scale, softcap, slope[:, None], bias[:, None], bias_key,
            seen_rows[:, None] & (j < bias_keys)[None, :], window, keys,
            SOFTCAP, ALIBI, BIAS, CAUSAL, WINDOW, MASKED,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        zero = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(s - zero[:, None])
        rescale = tl.exp2(top - zero)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            keep = kept(seed, threshold, b, head[:, None], query, start, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v_at = v + v_rows[:, None] + value_columns[None, :]
        value = load_rows(v_at, value_columns, inside, DV, BLOCK_DV, MASKED).to(q.dtype)
        out = tl.dot(p.to(q.dtype), value, out * rescale[:, None], input_precision="ieee")
        top = higher
    return out, total, top


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    q,  # rows of D elements, strides q_batch, q_head, q_row
    k,  # likewise; paged: k_batch is the stride of a page
    v,  # rows of DV elements
    out,  # like q, with v's width; splits: (splits, rows of lse, DV) float32
    lse,  # (B, H, S), varlen (H, total_q); splits: (splits, rows of lse), in units of log2(e)
    sinks,  # (H,) float32 or None; so may be all others up to seq_lens
    slopes,  # (H,) float32
    bias,  # strides bias_batch, bias_head, bias_row, bias_key, 0 where it is broadcast
    seed,  # (1,) int64
    k_scale,  # (Hkv,) float32 of an int8 cache
    v_scale,
    cu_q,  # (B + 1,) int32
    cu_k,
    table,  # (B, pages) int32, row stride table_row
    seq_lens,  # (B,) int32
    blocks, queries, keys, sequences, slots, total_q, total_k, splits, table_row, pages,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_rows,
    bias_batch, bias_head, bias_row, bias_key, bias_rows, bias_keys,
    scale, softcap, window, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, VARLEN: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, FIRST_PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    split = task % splits
    slot = task // splits % slots
    heads = task // splits // slots  # a set of PACK heads
    b, first, row, queries, key_row, keys = place(
        slot, blocks, queries, keys, cu_q, cu_k, total_q, total_k, sequences, PACK, BLOCK_M, VARLEN,
        True,  # causal: the blocks with the most keys first
    )  # fmt: skip
    if first >= queries * PACK:
        return
    wide_b = b.to(tl.int64)
    if PAGE:
        keys = tl.minimum(tl.maximum(tl.load(seq_lens + b), 0), keys)
        table += wide_b * table_row

    r = first + tl.arange(0, BLOCK_M)
    query = r // PACK
    head = heads * PACK + r % PACK
    seen_rows = query < queries
    wide_head = head.to(tl.int64)
    wide_row = (row + query).to(tl.int64)
    kv_head = (heads * PACK // GROUP).to(tl.int64)
    key_columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    q_at = q + (wide_b * q_batch + wide_head * q_head + wide_row * q_row)[:, None] * UNIT
    q_tile = load_rows(q_at + key_columns[None, :], key_columns, seen_rows, D, BLOCK_D, True)
    k += kv_head * k_head * UNIT
    v += kv_head * v_head * UNIT
    if not PAGE:
        k += (wide_b * k_batch + key_row.to(tl.int64) * k_row) * UNIT
        v += (wide_b * v_batch + key_row.to(tl.int64) * v_row) * UNIT
    if k_scale is not None:
        scale = scale * tl.load(k_scale + kv_head)
    slope = seen_rows
    if slopes is not None:
        slope = tl.load(slopes + head, mask=seen_rows, other=0.0) * LOG2E
    bias_at = seen_rows
    seen_bias = seen_rows
    if bias is not None:
        bias_at = bias + wide_b * bias_batch + wide_head * bias_head + query.to(tl.int64) * bias_row
        seen_bias = seen_rows & (query < bias_rows)

    # the keys that the rows see, in up to three parts: masked lo .. full_lo (window),
    # full_lo .. full_hi, masked full_hi .. hi
    shift = keys - queries
    earliest = first // PACK + shift
    latest = tl.minimum((first + BLOCK_M - 1) // PACK, queries - 1) + shift
    lo, hi = seen_keys(earliest, latest, keys, window, BLOCK_N, CAUSAL, WINDOW)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BLOCK_N) * BLOCK_N
        lo += split * share
        hi = tl.minimum(hi, lo + share)
    full_lo, full_hi = whole_tiles(
        lo, hi, earliest, latest, window, BLOCK_N, CAUSAL, WINDOW, FIRST_PART
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if (sinks is not None) and (not SPLIT):
        top = tl.load(sinks + head, mask=seen_rows, other=0.0) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
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
        result, total, top = _attend(
            result, total, top, q_tile, k, v, seed, table, bias_at, start, end, keys,
            query + shift, query, seen_bias, slope, b, head, key_columns, value_columns,
            pages, k_batch, k_row, v_batch, v_row, bias_key, bias_keys, scale, softcap, window,
            threshold, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, UNIT, PAGE, SOFTCAP,
            slopes is not None, bias is not None, seed is not None, CAUSAL, WINDOW, part != 1,
        )  # fmt: skip

    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    if seed is not None:
        factor *= keep_scale
    if v_scale is not None:
        factor *= tl.load(v_scale + kv_head)
    lse_row = wide_b * lse_batch + wide_head * lse_head + wide_row
    lse_value = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    if SPLIT:
        lse_row += split.to(tl.int64) * lse_rows
        out_row_at = lse_row * DV
    else:
        lse_value *= LN2
        out_row_at = (wide_b * out_batch + wide_head * out_head + wide_row * out_row) * UNIT
    tl.store(lse + lse_row, lse_value, mask=seen_rows)
    out_at = out + out_row_at[:, None] + value_columns[None, :]
    store_rows(out_at, result * factor[:, None], value_columns, seen_rows, DV, BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def _combine(
    parts,  # (splits, B, H, S, DV) float32
    part_lse,  # (splits, B, H, S), in units of log2(e)
    sinks,  # (H,) float32 or None
    out,  # rows of DV elements
    lse,  # (B, H, S)
    queries, heads, lse_rows, splits, out_batch, out_head, out_row,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one row: their out, weighted by the softmax of their lse. SPLITS is a
    power of two >= splits."""
    row = tl.program_id(0).to(tl.int64)
    b = row // queries // heads
    head = row // queries % heads
    split = tl.arange(0, SPLITS)
    at = split.to(tl.int64) * lse_rows + row
    part = tl.load(part_lse + at, mask=split < splits, other=float("-inf"))
    top = tl.max(part, 0)
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        top = tl.maximum(top, sink)
    zero = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(part - zero)
    total = tl.sum(weight, 0)
    if sinks is not None:
        total += tl.exp2(sink - zero)
    columns = tl.arange(0, BLOCK_DV)
    # a share that sees nothing has written zeros; lanes past the last split have no data
    mask = (split < splits)[:, None] & (columns < DV)[None, :]
    tile = tl.load(parts + at[:, None] * DV + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(tile * weight[:, None], 0) * tl.where(total == 0.0, 0.0, 1.0 / total)
    out_at = out + b * out_batch + head * out_head + row % queries * out_row + columns
    tl.store(out_at, result.to(out.dtype.element_ty), mask=columns < DV)
    lse_value = tl.where(total == 0.0, float("-inf"), zero + tl.log2(total))
    tl.store(lse + row, lse_value * LN2)


# ---- tile sizes ----------------------------------------------------------------------------------


def _tiles(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


# By element size and padded head width, then by architecture; chosen for no register spills and for
# tensor cores (gates/triton_gate/attention.py). OPTIONS: with bias, dropout, ALiBi, softcap or int8
# keys, which need registers; without such a line the plain one is used.
OPTIONS = "options"
_MANY = Tiles(
    "attention",
    {
        (2, 64): {80: _tiles(128, 64, 8, 3), 100: _tiles(128, 128, 8, 2)},
        (2, 64, OPTIONS): {80: _tiles(64, 64, 8, 2)},
        (2, 128): {80: _tiles(128, 64, 8, 3)},
        (2, 128, OPTIONS): {80: _tiles(64, 64, 8, 2), 90: _tiles(128, 64, 8, 2)},
        (2, 256): {80: _tiles(64, 64, 8, 2)},
        (2, 512): {80: _tiles(16, 32, 4, 1)},
        (4, 64): {80: _tiles(32, 32, 4, 1)},
        (4, 64, OPTIONS): {80: _tiles(16, 32, 4, 1)},
        (4, 128): {80: _tiles(16, 32, 8, 1), 100: _tiles(16, 16, 8, 1)},
        (4, 256): {80: _tiles(16, 16, 8, 1)},
        (4, 512): {80: _tiles(16, 16, 8, 1)},
    },
)
# a matrix instruction has at least 16 rows
_FEW = Tiles(
    "attention, few rows",
    {
        (2, 64): {80: _tiles(16, 64, 4, 3)},
        (2, 128): {80: _tiles(16, 64, 4, 3), 100: _tiles(16, 64, 4, 2)},
        (2, 128, OPTIONS): {80: _tiles(16, 32, 4, 3)},
        (2, 256): {80: _tiles(16, 32, 4, 3)},
        (2, 512): {80: _tiles(16, 32, 4, 1)},
        (4, 64): {80: _tiles(16, 32, 4, 1)},
        (4, 128): {80: _tiles(16, 32, 8, 1), 100: _tiles(16, 16, 8, 1)},
        (4, 256): {80: _tiles(16, 16, 8, 1)},
        (4, 512): {80: _tiles(16, 16, 8, 1)},
    },
)
FEW_ROWS = 16
_WIDEST = 512  # wider heads use its tiles; widths from 512 on are not in the gate
_MOST_SPLITS = 32  # partial results of one row, which `_combine` holds in registers
_LEAST_SHARE = 256  # keys that are worth a program of their own
_WIDEST_WINDOW = 2**30  # sees all of that many keys; kernels add it to a row index in 32 bits


def padded(width: int) -> int:
    """Round up to a power of two, at least the 16 that a matrix instruction multiplies."""
    return max(16, triton.next_power_of_2(width))


def sizes_of(tiles: Tiles, q: Tensor, width: int, o: "Options", int8: bool = False) -> Config:
    """The entry for q's dtype and architecture, a padded head width and the given options."""
    key = q.element_size(), min(max(width, 64), _WIDEST)
    if not (o.slopes is o.bias is o.seed is None and o.softcap == 0) or int8:
        with_options = (*key, OPTIONS)
        key = with_options if with_options in tiles.table else key
    return tiles.of(key, q)


# ---- host ----------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The layout of the sequences. `queries` and `keys` count the rows of one sequence. Packed: of
    all sequences together. Paged: `keys` is what the table has room for per sequence."""

    sequences: int
    queries: int
    keys: int
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    longest_q: int = 0  # packed: a hint
    table: Tensor | None = None
    seq_lens: Tensor | None = None
    page: int = 0  # keys per page
    pages: int = 0


class Options(NamedTuple):
    """The options of the operators in the form that the kernels expect."""

    sinks: Tensor | None
    slopes: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    causal: bool
    scale: float
    window: int
    softcap: float
    threshold: int  # a random word below it, read as unsigned, drops its probability
    keep_scale: float

    def flags(self) -> dict[str, bool]:
        return {"CAUSAL": self.causal, "WINDOW": self.window > 0, "SOFTCAP": self.softcap > 0}

    def parts(self) -> dict[str, int]:
        """Return the parts of the forward and of dq (`_forward`). With dropout one masked part
        covers all keys: the draws cost more than the masks, and the code shrinks to a third."""
        return {"FIRST_PART": 2 if self.seed is not None else 0 if self.window > 0 else 1}

    def numbers(self) -> tuple:
        return float(self.scale), float(self.softcap), self.window, self.threshold, self.keep_scale


def options(sinks, alibi_slopes, bias, seed, causal, scale, window, softcap, dropout_p) -> Options:
    drops = min(int(dropout_p * 2**32), 2**32 - 1)  # dropping all relies on keep_scale 0
    return Options(
        _floats(sinks), _floats(alibi_slopes), bias, seed, causal or window > 0, scale,
        min(window, _WIDEST_WINDOW), softcap, drops - 2**32 if drops >= 2**31 else drops,
        1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
    )  # fmt: skip


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def strides(t: Tensor, dims: tuple[int | None, int, int]) -> tuple[int, int, int]:
    """Return the strides of sequence (or page), head and row; packed sequences have none."""
    sequence, head, row = dims
    return 0 if sequence is None else t.stride(sequence), t.stride(head), t.stride(row)


def in_units(*steps: tuple[int, ...]) -> tuple[int, list[int]]:
    """UNIT, and the strides in units of it. Reading 16 bytes at a time requires multiples of 16
    elements for int8, of 8 or fewer for the other dtypes."""
    flat = [n for step in steps for n in step]
    unit = next(u for u in (16, 8, 1) if all(n % u == 0 for n in flat))
    return unit, [n // unit for n in flat]


NO_BIAS = (0, 0, 0, 0, 0, 0)


def bias_arguments(bias: Tensor | None) -> tuple[int, ...]:
    """The bias's strides of sequence, head, row and key, and its numbers of rows and keys."""
    if bias is None:
        return NO_BIAS
    steps = (0 if n == 1 else s for n, s in zip(bias.shape, bias.stride()))
    return *steps, *(2**31 - 1 if n == 1 else n for n in bias.shape[2:])


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dims: tuple, kv_dims: tuple,
    layout: Layout, o: Options, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill out and lse. `dims`: the dimensions of sequence, head and row in q and out; `kv_dims`:
    those in k and v. Elements of a row are contiguous.
    """
    heads, kv_heads = q.shape[dims[1]], k.shape[kv_dims[1]]
    group = heads // kv_heads
    width, v_width = q.shape[-1], v.shape[-1]
    block_d, block_dv = padded(width), padded(v_width)
    widest = max(block_d, block_dv)
    varlen = layout.cu_q is not None
    longest = layout.longest_q if varlen else layout.queries
    int8 = k.dtype == torch.int8
    config = sizes_of(_MANY, q, widest, o, int8)
    pack = group if longest < config.sizes["BLOCK_M"] else 1
    if longest * pack <= FEW_ROWS:
        config = sizes_of(_FEW, q, widest, o, int8)
    block_m = config.sizes["BLOCK_M"]
    blocks = triton.cdiv(layout.queries * pack, block_m)
    if varlen:
        slots = layout.queries * pack // block_m + layout.sequences
    else:
        slots = blocks * layout.sequences
    if 0 in (slots, heads, layout.queries, layout.sequences):
        return
    programs = slots * (heads // pack)
    splits = 1 if varlen else _splits(programs, layout.keys, multiprocessors(q.device))
    to, to_lse = out, lse
    out_steps = strides(out, dims)
    if splits > 1:
        to = q.new_empty(splits, *lse.shape, v_width, dtype=torch.float32)
        to_lse = lse.new_empty(splits, *lse.shape)
    unit, steps = in_units(
        strides(q, dims), strides(k, kv_dims), strides(v, kv_dims),
        (0, 0, 0) if splits > 1 else out_steps,
    )  # fmt: skip
    lse_batch, lse_head = (
        (0, layout.queries) if varlen else (heads * layout.queries, layout.queries)
    )
    launch(
        _forward, (programs * splits,),
        q, k, v, to, to_lse, o.sinks, o.slopes, o.bias, o.seed, k_scale, v_scale,
        layout.cu_q, layout.cu_k, layout.table, layout.seq_lens,
        blocks, layout.queries, layout.keys, layout.sequences, slots, layout.queries, layout.keys,
        splits, 0 if layout.table is None else layout.table.stride(0), layout.pages,
        *steps, lse_batch, lse_head, lse.numel(), *bias_arguments(o.bias), *o.numbers(),
        config=config, D=width, DV=v_width, BLOCK_D=block_d, BLOCK_DV=block_dv, UNIT=unit,
        GROUP=group, PACK=pack, VARLEN=varlen, PAGE=layout.page, SPLIT=splits > 1, **o.flags(),
        **o.parts(),
    )  # fmt: skip
    if splits > 1:
        launch(
            _combine, (lse.numel(),), to, to_lse, o.sinks, out, lse, layout.queries, heads,
            lse.numel(), splits, *out_steps, config=_COMBINE, DV=v_width, BLOCK_DV=block_dv,
            SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip


_COMBINE = Config({}, num_warps=4, num_stages=1)


def _splits(programs: int, keys: int, at_a_time: int) -> int:
    """The number of programs that share a tile's keys: enough for two per multiprocessor."""
    wanted = min(2 * at_a_time // max(1, programs), keys // _LEAST_SHARE, _MOST_SPLITS)
    return max(1, wanted)


_DIMS = (0, 1, 2)


def dense(q: Tensor, k: Tensor) -> Layout:
    return Layout(q.shape[0], q.shape[2], k.shape[2])


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, numbers: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = elements_last(q, k, v)
    out = empty_out(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o = options(sinks, alibi_slopes, bias, seed, *numbers)
    forward(q, k, v, out, lse, _DIMS, _DIMS, dense(q, k), o)
    return out, lse


def __getattr__(name: str) -> Any:
    if name != "attention_backward":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastlm.kernels.attention_backward import attention_backward  # whose file imports this one

    return attention_backward
