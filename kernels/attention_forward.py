"""Compute out = softmax(scores) v and lse, without the scores in memory (Dao et al. 2022).

Dense, packed (varlen) and paged tensors; `fastlm.reference` defines the scores. A program handles
BLOCK_M rows of one key head and iterates over the keys that they see, BLOCK_N at a time:

                   keys  edge 0   edge 1             edge 2      edge 3
    BLOCK_M rows    |      |masked  |  full, unmasked   |  masked    |      split 0 | split 1 | ..
    of PACK heads   |      |------->|------------------>|----------->|

- Tiles that no row sees (after the diagonal, before the window) are skipped. Only the tiles at the
  edges of the visible range are masked.
- PACK = 1: the rows belong to one query head. Where a sequence has few rows, PACK is the number of
  query heads that share a key head: row r of a tile is query r // PACK of head r % PACK, and K and
  V are read once for all of these heads.
- With splits (few rows, many keys), the visible keys are divided among `splits` programs. Each
  writes out and lse of its share in float32; `_combine` adds the shares in the order of the splits.

q is read once, K and V once per block of rows (from L2 after the first). Scores are in units of
log2(e), so that exp is exp2. Products of 16-bit tensors run on the tensor cores with float32 sums,
those of float32 in float32. None of this has been measured on a GPU.

    b       sequence                        slot    block of rows (keys in dk, dv) of any sequence
    head    query head; kv_head: key head   task    program: a split of a slot of PACK heads
    query   row of q within its sequence    first   the first row of a slot
    i       query, aligned to the keys:     shift   keys - queries = i - query
            the last query is the last key
    j       key                             part    0, 1, 2: masked, full, masked
    at      offset or pointer of a tile     top     running maximum of the scores, in log2(e)

An option of attention is a number in `AttentionOptions` or a tensor, a field of `ScoreOptions`, and
its lines in `scores`, which the backward shares. An option that is off is None there: the compiler
removes its code.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config, TileConfigs, jit, launch, multiprocessors
from fastlm.reference import AttentionOptions

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ---- arguments of the kernels --------------------------------------------------------------------


class RowTensor(NamedTuple):
    """A tensor of rows, with its strides in units of UNIT elements.

    The unit tells the compiler which offsets are multiples of 16 or 8.
    """

    data: Tensor
    batch: int  # 0 for packed sequences; the stride of a page in a paged cache
    head: int
    row: int


class Bias(NamedTuple):
    """A bias with its strides: 0 where it is broadcast. The compiler must know a last stride of
    1."""

    data: Tensor
    batch: int
    head: int
    row: int
    key: int


class Dropout(NamedTuple):
    """The random numbers of dropout."""

    seed: Tensor  # (1,) int64
    threshold: int  # a random word below it, read as unsigned, drops its probability
    scale: float  # of a kept probability


class ScoreOptions(NamedTuple):
    """The options that change the scores or the probabilities; None where an option is off."""

    scale: float
    causal: bool | None  # True or None
    window: int | None  # also causal
    softcap: float | None
    alibi_slopes: Tensor | None  # (H,) float32
    dropout: Dropout | None


class CuSeqlens(NamedTuple):
    """The offsets at which packed sequences start: (B + 1,) int32 each."""

    cu_q: Tensor
    cu_k: Tensor


class PagedCache(NamedTuple):
    """A paged cache. `k_scale` and `v_scale`: (Hkv,) float32 of an int8 cache."""

    block_table: Tensor  # (B, pages) int32
    seq_lens: Tensor  # (B,) int32
    k_scale: Tensor | None
    v_scale: Tensor | None
    table_stride: int  # between its rows
    num_pages: int


class Sizes(NamedTuple):
    """The numbers of sequences, rows and blocks, and the strides of lse."""

    sequences: int
    queries: int  # of one sequence; of all packed sequences together
    keys: int  # likewise; paged: the capacity of the table
    blocks: int  # of rows (keys in dk, dv) of one sequence
    slots: int
    lse_batch: int  # strides of lse and delta: (B, H, S), packed (H, total_q)
    lse_head: int
    bias_rows: int
    bias_keys: int
    splits: int = 1
    lse_split: int = 0


class AttentionShape(NamedTuple):
    """The compile-time constants of a launch, besides the sizes of tiles."""

    D: int  # width of a row of q and k
    DV: int  # of v and out
    BLOCK_D: int  # padded
    BLOCK_DV: int
    GROUP: int  # query heads per key head
    UNIT: int
    PACK: int = 1
    PAGE: int = 0  # keys per page
    SPLIT: bool = False
    FIRST_PART: int = 0
    LAST_PART: int = 2


# Parameters whose new integers compile no new variant: all but the strides of a bias. (`opts`:
# Triton has an argument `options` of its own.)
LENGTHS = (
    "q k v out dout dq dk dv pages opts sizes queries heads rows columns batches lse_rows splits"
).split()


# ---- what the kernels of all three ops share -----------------------------------------------------


@triton.jit
def sequence(cu, b, total):
    """Return first row and length of packed sequence b, clamped to the tensor whatever cu has."""
    start = tl.minimum(tl.maximum(tl.load(cu + b), 0), total)
    return start, tl.maximum(tl.minimum(tl.load(cu + b + 1), total) - start, 0)


@triton.jit
def locate(
    slot, sizes, cu_seqlens, PACK: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr = False
):
    """Return the sequence and the block of a slot.

    These are b, the block's first row, and the first row and length of the sequence in this tensor
    and in the other one. KEYS: a block of keys, and the other tensor has the queries.

    Packed: the slots of sequence b start at cu[b] * PACK // BLOCK + b. It has at least as many
    slots as blocks, so that the grid follows from the totals. Offsets that do not rise from 0 may
    put a slot before the start of its sequence; such a slot gets no rows.
    """
    length = sizes.keys if KEYS else sizes.queries
    other_length = sizes.queries if KEYS else sizes.keys
    if cu_seqlens is not None:
        cu = cu_seqlens.cu_k if KEYS else cu_seqlens.cu_q
        low = slot * 0
        high = low + sizes.sequences
        while high - low > 1:
            middle = (low + high) // 2
            after = tl.load(cu + middle) * PACK // BLOCK + middle > slot
            low = tl.where(after, low, middle)
            high = tl.where(after, middle, high)
        b = low
        start, length = sequence(cu, b, length)
        other, other_length = sequence(
            cu_seqlens.cu_q if KEYS else cu_seqlens.cu_k, b, other_length
        )
        block = slot - (start * PACK // BLOCK + b)
        first = tl.where(block < 0, length * PACK, block * BLOCK)
    else:
        b = slot // sizes.blocks
        block = slot % sizes.blocks
        if not KEYS:  # causal: the blocks with the most keys first
            block = sizes.blocks - 1 - block
        first = block * BLOCK
        start = slot * 0
        other = start
    return b, first, start, length, other, other_length


@triton.jit
def key_edges(
    earliest, latest, keys, split, splits, opts, SHAPE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return the four edges of the three parts of the visible keys, of a split's share of them.

    Visible are the keys that any row in earliest .. latest sees. The inner two edges are multiples
    of BLOCK_N: between them every row sees all keys.
    """
    lo = keys * 0
    hi = keys
    if opts.causal is not None:
        hi = tl.minimum(keys, latest + 1)
    if opts.window is not None:
        lo = tl.maximum(earliest - opts.window + 1, 0) // BLOCK_N * BLOCK_N
    if SHAPE.SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BLOCK_N) * BLOCK_N
        lo += split * share
        hi = tl.minimum(hi, lo + share)
    full_hi = hi
    if opts.causal is not None:
        full_hi = tl.minimum(hi, earliest + 1)
    full_hi = tl.maximum(tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N, lo)
    full_lo = lo
    if opts.window is not None:
        full_lo = tl.cdiv(tl.maximum(latest - opts.window + 1, 0), BLOCK_N) * BLOCK_N
        full_lo = tl.minimum(tl.maximum(full_lo, lo), full_hi)
    if SHAPE.FIRST_PART == 2:
        full_hi = lo
    return lo, full_lo, full_hi, hi


@triton.jit
def offsets(t, b, head, row, UNIT: tl.constexpr):
    """Return the offset of a row, or of each row of a tile, in elements of `RowTensor` t."""
    return (b.to(tl.int64) * t.batch + head.to(tl.int64) * t.head + row.to(tl.int64) * t.row) * UNIT


@triton.jit
def row_offsets(t, row, UNIT: tl.constexpr):
    """Return the same within one sequence and head, for a tensor from `head_rows`."""
    return row.to(tl.int64) * t.row * UNIT


@triton.jit
def head_rows(t, b, head, row, UNIT: tl.constexpr):
    """Return `RowTensor` t from this row of the sequence and head on."""
    return RowTensor(t.data + offsets(t, b, head, row, UNIT), t.batch, t.head, t.row)


@triton.jit
def load_tile(
    at, offsets, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr = True
):
    """Load a tile (rows, BLOCK) with rows of WIDTH elements.

    Elements past WIDTH are zero. If MASKED, rows where `mask` is false are zero too.
    """
    columns = tl.arange(0, BLOCK)
    at = at + offsets[:, None] + columns[None, :]
    if WIDTH == BLOCK:
        if MASKED:
            return tl.load(at, mask=mask[:, None], other=0)
        else:
            return tl.load(at)
    else:
        if MASKED:
            return tl.load(at, mask=mask[:, None] & (columns < WIDTH)[None, :], other=0)
        else:
            return tl.load(at, mask=(columns < WIDTH)[None, :], other=0)


@triton.jit
def store_tile(at, offsets, tile, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    at = at + offsets[:, None] + columns[None, :]
    if WIDTH == BLOCK:
        tl.store(at, tile.to(at.dtype.element_ty), mask=mask[:, None])
    else:
        mask = mask[:, None] & (columns < WIDTH)[None, :]
        tl.store(at, tile.to(at.dtype.element_ty), mask=mask)


class BiasRows(NamedTuple):
    """The bias of a tile's rows, along the axis of the rows."""

    data: Any  # pointers
    inside: Any  # mask: the bias may have fewer rows
    key: Any  # stride
    keys: Any


class ScoreRows(NamedTuple):
    """The properties of a tile's rows that `scores` needs, along the axis of the rows."""

    i: Any
    slope: Any  # of ALiBi, times log2(e), or None
    bias: Any  # BiasRows or None


@triton.jit
def head_bias(bias, b, head):
    """Return the `Bias` of this sequence and head."""
    at = bias.data + b.to(tl.int64) * bias.batch + head.to(tl.int64) * bias.head
    return Bias(at, bias.batch, bias.head, bias.row, bias.key)


@triton.jit
def bias_rows(bias, query, mask, sizes, AXIS: tl.constexpr):
    """Return the `BiasRows` of these queries; `bias` from `head_bias`. AXIS: the axis of the
    keys."""
    at = bias.data + query.to(tl.int64) * bias.row
    inside = mask & (query < sizes.bias_rows)
    return BiasRows(
        tl.expand_dims(at, AXIS), tl.expand_dims(inside, AXIS), bias.key, sizes.bias_keys
    )


@triton.jit
def scores(
    product, scale, rows, j, keys, opts, MASKED: tl.constexpr, AXIS: tl.constexpr = 1
):  # fmt: skip
    """Return log2(e) times the scores of a tile of q k^T, and the derivative of the scores with
    respect to scale q k^T.

    The keys j run along AXIS, `rows` along the other: the tile may be transposed.
    """
    key = tl.expand_dims(j, 1 - AXIS)
    derivative = 1.0
    if opts.softcap is not None:
        # tanh, exactly odd; 1 - 2 / (e^2x + 1) would lose the digits of small x
        x = product * (scale / opts.softcap)
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        small = x * (1.0 - x * x * (0.3333333333 - 0.1333333333 * x * x))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -t, t))
        s = t * (opts.softcap * LOG2E)
        derivative = 1.0 - t * t
    else:
        s = product * (scale * LOG2E)
    if opts.alibi_slopes is not None:
        s -= rows.slope * tl.abs(rows.i - key).to(tl.float32)
    if rows.bias is not None:
        at = rows.bias.data + key.to(tl.int64) * rows.bias.key
        inside = rows.bias.inside & tl.expand_dims(j < rows.bias.keys, 1 - AXIS)
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        visible = key < keys
        if opts.causal is not None:
            visible = visible & (key <= rows.i)
        if opts.window is not None:
            visible = visible & (key > rows.i - opts.window)
        s = tl.where(visible, s, float("-inf"))
    return s, derivative


@triton.jit
def dropout_mask(dropout, b, head, query, start, BLOCK: tl.constexpr):
    """Return which of the probabilities (query, start .. start + BLOCK) dropout keeps.

    Philox4x32-10 as in `reference.dropout_factor`: a counter's four words are for keys 16 apart.
    """
    if BLOCK >= 64:
        lanes = start // 4 + tl.arange(0, BLOCK // 4)
    else:
        lanes = start // 64 * 16 + tl.arange(0, 16)
    zero = query[:, None] * 0 + lanes[None, :] * 0
    w0, w1, w2, w3 = tl.philox(
        tl.load(dropout.seed),
        lanes[None, :] + zero,
        query[:, None] + zero,
        (head + zero).to(tl.int32),
        b + zero,
    )
    first_kept = dropout.threshold.to(tl.uint32, bitcast=True)
    k0 = (w0 >= first_kept).to(tl.int8)
    k1 = (w1 >= first_kept).to(tl.int8)
    k2 = (w2 >= first_kept).to(tl.int8)
    k3 = (w3 >= first_kept).to(tl.int8)
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


@triton.jit
def lse_row(sizes, b, head, row):
    """Return the offset of a row, or of each row of a tile, in lse and delta."""
    return b.to(tl.int64) * sizes.lse_batch + head.to(tl.int64) * sizes.lse_head + row.to(tl.int64)


# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def _key_offsets(j, mask, k, v, table, pages, SHAPE: tl.constexpr):
    """Return the offsets of the keys j in k and in v, through the page table if there is one."""
    if pages is not None:
        page = tl.load(table + j // SHAPE.PAGE, mask=mask, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages.num_pages - 1).to(tl.int64)  # inside the cache
        slot = (j % SHAPE.PAGE).to(tl.int64)
        k_offsets = (page * k.batch + slot * k.row) * SHAPE.UNIT
        v_offsets = (page * v.batch + slot * v.row) * SHAPE.UNIT
    else:
        k_offsets = row_offsets(k, j, SHAPE.UNIT)
        v_offsets = row_offsets(v, j, SHAPE.UNIT)
    return k_offsets, v_offsets


@triton.jit
def _softmax_step(s, total, top):
    """Return the probabilities of a tile of scores, the factor of earlier sums, total and top.

    Probabilities and factor are in units of 2^top, the new maximum.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # no visible key yet
    p = tl.exp2(s - zero[:, None])
    rescale = tl.exp2(top - zero)
    return p, rescale, total * rescale + tl.sum(p, 1), new_top


@triton.jit
def _attend(
    out, total, top, q, k, v, lo, hi, keys, rows, query, b, head, table, pages, scale, opts,
    SHAPE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys lo .. hi to out (M, DV) and total (M), which are in units of 2^top."""
    for start in tl.range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        mask = j < keys
        k_offsets, v_offsets = _key_offsets(j, mask, k, v, table, pages, SHAPE)
        key = load_tile(k.data, k_offsets, mask, SHAPE.D, SHAPE.BLOCK_D, MASKED).to(q.dtype)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        s, _ = scores(s, scale, rows, j, keys, opts, MASKED)
        p, rescale, total, top = _softmax_step(s, total, top)
        if opts.dropout is not None:
            keep = dropout_mask(opts.dropout, b, head[:, None], query, start, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        value = load_tile(v.data, v_offsets, mask, SHAPE.DV, SHAPE.BLOCK_DV, MASKED).to(q.dtype)
        out = tl.dot(p.to(q.dtype), value, out * rescale[:, None], input_precision="ieee")
    return out, total, top


@jit(*LENGTHS)
def _forward(
    q,  # RowTensor of D elements
    k,  # RowTensor of D elements
    v,  # RowTensor of DV elements
    out,  # RowTensor of DV elements; splits: (splits, rows of lse, DV) float32
    lse,  # (B, H, S), packed (H, total_q); splits: (splits, rows of lse), in units of log2(e)
    sinks,  # (H,) float32 or None
    bias,  # Bias or None
    cu_seqlens,  # CuSeqlens or None
    pages,  # PagedCache or None
    opts,  # ScoreOptions
    sizes,  # Sizes
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    split = task % sizes.splits
    slot = task // sizes.splits % sizes.slots
    heads = task // sizes.splits // sizes.slots  # a set of PACK heads
    b, first, row, queries, key_row, keys = locate(slot, sizes, cu_seqlens, SHAPE.PACK, BLOCK_M)
    if first >= queries * SHAPE.PACK:
        return
    r = first + tl.arange(0, BLOCK_M)
    query = r // SHAPE.PACK
    head = heads * SHAPE.PACK + r % SHAPE.PACK
    mask = query < queries
    kv_head = (heads * SHAPE.PACK // SHAPE.GROUP).to(tl.int64)
    q_at = offsets(q, b, head, row + query, SHAPE.UNIT)
    q_tile = load_tile(q.data, q_at, mask, SHAPE.D, SHAPE.BLOCK_D)
    scale = opts.scale
    table = None
    if pages is not None:
        keys = tl.minimum(tl.maximum(tl.load(pages.seq_lens + b), 0), keys)
        table = pages.block_table + b.to(tl.int64) * pages.table_stride
        k = RowTensor(k.data + kv_head * k.head * SHAPE.UNIT, k.batch, k.head, k.row)
        v = RowTensor(v.data + kv_head * v.head * SHAPE.UNIT, v.batch, v.head, v.row)
        if pages.k_scale is not None:
            scale = scale * tl.load(pages.k_scale + kv_head)
    else:
        k = head_rows(k, b, kv_head, key_row, SHAPE.UNIT)
        v = head_rows(v, b, kv_head, key_row, SHAPE.UNIT)
    # Triton 3.6 cannot return None from a function: values that may be None are computed here
    slope = None
    if opts.alibi_slopes is not None:
        slope = (tl.load(opts.alibi_slopes + head, mask=mask, other=0.0) * LOG2E)[:, None]
    bias_tile = None
    if bias is not None:
        bias_tile = bias_rows(head_bias(bias, b, head), query, mask, sizes, 1)
    shift = keys - queries
    rows = ScoreRows((query + shift)[:, None], slope, bias_tile)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if (sinks is not None) and (not SHAPE.SPLIT):
        top = tl.load(sinks + head, mask=mask, other=0.0) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV  # Triton 3.6: an attribute is no constexpr
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    earliest = first // SHAPE.PACK + shift
    latest = tl.minimum((first + BLOCK_M - 1) // SHAPE.PACK, queries - 1) + shift
    edges = key_edges(earliest, latest, keys, split, sizes.splits, opts, SHAPE, BLOCK_N)
    FIRST_PART: tl.constexpr = SHAPE.FIRST_PART
    for part in tl.static_range(FIRST_PART, 3):
        result, total, top = _attend(
            result, total, top, q_tile, k, v, edges[part], edges[part + 1], keys, rows, query, b,
            head, table, pages, scale, opts, SHAPE, BLOCK_N, part != 1,
        )  # fmt: skip

    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    if opts.dropout is not None:
        factor *= opts.dropout.scale
    if pages is not None:
        if pages.v_scale is not None:
            factor *= tl.load(pages.v_scale + kv_head)
    at = lse_row(sizes, b, head, row + query)
    lse_value = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    if SHAPE.SPLIT:
        at += split.to(tl.int64) * sizes.lse_split
        out_at = at * SHAPE.DV
    else:
        lse_value *= LN2
        out_at = offsets(out, b, head, row + query, SHAPE.UNIT)
    tl.store(lse + at, lse_value, mask=mask)
    store_tile(out.data, out_at, result * factor[:, None], mask, SHAPE.DV, SHAPE.BLOCK_DV)


@jit(*LENGTHS)
def _combine(
    parts,  # (splits, B, H, S, DV) float32
    part_lse,  # (splits, B, H, S), in units of log2(e)
    sinks,  # (H,) float32 or None
    out,  # RowTensor of DV elements, UNIT 1
    lse,  # (B, H, S)
    queries, heads, lse_rows, splits,
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
    # a split without visible keys has written zeros; lanes past the last split have no data
    mask = (split < splits)[:, None] & (columns < DV)[None, :]
    tile = tl.load(parts + at[:, None] * DV + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(tile * weight[:, None], 0) * tl.where(total == 0.0, 0.0, 1.0 / total)
    out_at = out.data + offsets(out, b, head, row % queries, 1) + columns
    tl.store(out_at, result.to(out.data.dtype.element_ty), mask=columns < DV)
    lse_value = tl.where(total == 0.0, float("-inf"), zero + tl.log2(total))
    tl.store(lse + row, lse_value * LN2)


# ---- tile sizes ----------------------------------------------------------------------------------


def _tiles(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


# By element size and padded head width, then by architecture; selected for no register spills and
# for tensor cores (tests/gates/triton_gate). OPTIONS: with bias, dropout, ALiBi, softcap or int8
# keys, which need registers; without such a line the plain one is used.
OPTIONS = "options"
_CONFIGS = TileConfigs(
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
_FEW_ROWS_CONFIGS = TileConfigs(
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
_MAX_WIDTH = 512  # wider heads use its tiles; widths from 512 on are not in the gate
_MAX_SPLITS = 32  # partial results of one row, which `_combine` holds in registers
_MIN_SHARE = 256  # keys that are worth a program of their own
_MAX_WINDOW = 2**30  # no window, in effect; kernels add it to a row index in 32 bits


def padded_width(width: int) -> int:
    """Round up to a power of two, at least the 16 that a matrix instruction multiplies."""
    return max(16, triton.next_power_of_2(width))


def needs_registers(bias: Tensor | None, o: ScoreOptions) -> bool:
    return not (bias is o.alibi_slopes is o.softcap is o.dropout is None)


def select_config(configs: TileConfigs, q: Tensor, width: int, with_options: bool) -> Config:
    """Return the entry for q's dtype and architecture and a padded head width. `with_options`: the
    entry for OPTIONS, if there is one."""
    key = q.element_size(), min(max(width, 64), _MAX_WIDTH)
    options_key = (*key, OPTIONS)
    return configs.select(options_key if with_options and options_key in configs.table else key, q)


# ---- host ----------------------------------------------------------------------------------------


class SequenceLayout(NamedTuple):
    """The layout of the sequences.

    `queries` and `keys` count the rows of one sequence. Packed: of all sequences together. Paged:
    `keys` is the capacity of the table per sequence.
    """

    sequences: int
    queries: int
    keys: int
    cu_seqlens: CuSeqlens | None = None
    max_seqlen_q: int = 0  # packed: a hint
    pages: PagedCache | None = None
    page_size: int = 0  # keys per page

    def lse_strides(self, heads: int) -> tuple[int, int]:
        return 0 if self.cu_seqlens else heads * self.queries, self.queries

    def slots(self, rows: int, block: int) -> tuple[int, int]:
        """Return the blocks of one sequence of `rows` rows, and the slots of all sequences."""
        blocks = triton.cdiv(rows, block)
        return (
            blocks,
            rows // block + self.sequences if self.cu_seqlens else blocks * self.sequences,
        )


def score_options(
    alibi_slopes: Tensor | None, seed: Tensor | None, options: AttentionOptions
) -> ScoreOptions:
    dropout = None
    if seed is not None:
        threshold = min(int(options.dropout_p * 2**32), 2**32 - 1)  # p = 1 relies on scale 0
        dropout = Dropout(
            seed, threshold - 2**32 if threshold >= 2**31 else threshold,
            1 / (1 - options.dropout_p) if options.dropout_p < 1 else 0.0,
        )  # fmt: skip
    return ScoreOptions(
        float(options.scale), True if options.causal or options.window > 0 else None,
        min(options.window, _MAX_WINDOW) if options.window > 0 else None,
        float(options.softcap) if options.softcap > 0 else None, contiguous_float(alibi_slopes),
        dropout,
    )  # fmt: skip


def contiguous_float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


Dims = tuple[int | None, int, int]


def row_tensors(*tensors: tuple[Tensor, Dims | None]) -> tuple[int, list[RowTensor]]:
    """Return UNIT and the tensors with their strides in units of it.

    Reading 16 bytes at a time requires multiples of 16 elements for int8, of 8 or fewer for the
    other dtypes.

    Args:
        tensors: each with its dimensions of sequence (or page), head and row. Packed sequences have
            no dimension, and their stride is 0.
    """
    steps = [
        [0 if d is None else t.stride(d) for d in dims or (None, None, None)] for t, dims in tensors
    ]
    unit = next(u for u in (16, 8, 1) if all(n % u == 0 for step in steps for n in step))
    rows = (RowTensor(t, *(n // unit for n in step)) for (t, _), step in zip(tensors, steps))
    return unit, list(rows)


def bias_tensor(bias: Tensor | None) -> tuple[Bias | None, tuple[int, int]]:
    """Return the bias with its strides, and its numbers of rows and keys."""
    if bias is None:
        return None, (0, 0)
    steps = (0 if n == 1 else s for n, s in zip(bias.shape, bias.stride()))
    rows, keys = (2**31 - 1 if n == 1 else n for n in bias.shape[2:])
    return Bias(bias, *steps), (rows, keys)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dims: Dims, kv_dims: Dims,
    layout: SequenceLayout, sinks: Tensor | None, bias: Tensor | None, options: ScoreOptions,
) -> None:  # fmt: skip
    """Fill out and lse. Elements of a row are contiguous.

    Args:
        dims: the dimensions of sequence, head and row in q and out.
        kv_dims: those in k and v.
    """
    heads, kv_heads = q.shape[dims[1]], k.shape[kv_dims[1]]
    group = heads // kv_heads
    width, v_width = q.shape[-1], v.shape[-1]
    block_d, block_dv = padded_width(width), padded_width(v_width)
    with_options = needs_registers(bias, options) or k.dtype == torch.int8
    config = select_config(_CONFIGS, q, max(block_d, block_dv), with_options)
    longest = layout.max_seqlen_q if layout.cu_seqlens else layout.queries
    pack = group if longest < config.sizes["BLOCK_M"] else 1
    if longest * pack <= FEW_ROWS:
        config = select_config(_FEW_ROWS_CONFIGS, q, max(block_d, block_dv), with_options)
    blocks, slots = layout.slots(layout.queries * pack, config.sizes["BLOCK_M"])
    if 0 in (slots, heads, layout.queries, layout.sequences):
        return
    programs = slots * (heads // pack)
    splits = 1 if layout.cu_seqlens else _splits(programs, layout.keys, multiprocessors(q.device))
    parts, parts_lse, parts_dims = out, lse, dims
    if splits > 1:
        parts = q.new_empty(splits, *lse.shape, v_width, dtype=torch.float32)
        parts_lse, parts_dims = lse.new_empty(splits, *lse.shape), None
    unit, tensors = row_tensors((q, dims), (k, kv_dims), (v, kv_dims), (parts, parts_dims))
    sinks = contiguous_float(sinks)
    bias_strides, bias_size = bias_tensor(bias)
    launch(
        _forward, (programs * splits,), *tensors, parts_lse, sinks, bias_strides,
        layout.cu_seqlens, layout.pages, options,
        Sizes(
            layout.sequences, layout.queries, layout.keys, blocks, slots,
            *layout.lse_strides(heads), *bias_size, splits, lse.numel(),
        ),
        config=config,
        SHAPE=AttentionShape(
            width, v_width, block_d, block_dv, group, unit, pack, layout.page_size, splits > 1,
            first_part(options),
        ),
    )  # fmt: skip
    if splits > 1:
        launch(
            _combine, (lse.numel(),), parts, parts_lse, sinks,
            RowTensor(out, *(out.stride(d) for d in dims)), lse, layout.queries, heads, lse.numel(),
            splits, config=_COMBINE, DV=v_width, BLOCK_DV=block_dv,
            SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip


_COMBINE = Config({}, num_warps=4, num_stages=1)


def first_part(options: ScoreOptions) -> int:
    """Return the first part of the keys that the forward and dq need.

    With dropout one masked part covers all keys: the random numbers cost more than the masks, and
    the code shrinks to a third.
    """
    return 2 if options.dropout else 0 if options.window else 1


def _splits(programs: int, keys: int, multiprocessors: int) -> int:
    """Return how many programs share a tile's keys: enough for two per multiprocessor."""
    splits = min(2 * multiprocessors // max(1, programs), keys // _MIN_SHARE, _MAX_SPLITS)
    return max(1, splits)
