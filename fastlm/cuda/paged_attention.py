"""paged_attention by csrc/cuda/paged_attention.cu: the decode step.

`SUPPORT` says which calls it runs; the next backends run the others. Rows that are not dense are
copied first.
"""

import functools

import torch
from torch import Tensor

from fastlm.backend import Support
from fastlm.cuda import constants, extension, multiprocessors, stream
from fastlm.memory_order import dense_rows
from fastlm.reference import AttentionOptions

# Rows that matrix instructions cannot handle (float32, for one) read K and V once per two rows.
_MAX_DOT_ROWS = 8
_COPY = 16  # bytes that matrix instructions load at a time; dot products of int8 load 8


@functools.cache
def _fits(device: torch.device, rows: int, width: int, v_width: int, size: int) -> bool:
    """Return whether a block has enough shared memory. Rows of width 256 need 143 KiB, more than an
    L40S has; with 64 rows of q they need 168 KiB, more than an A100 has."""
    if device.type != "cuda":
        return True
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return extension().paged_attention_shared(rows, width, v_width, size) <= available


def _is_aligned(t: Tensor, size: int) -> bool:
    """Return whether every row of `dense(t)` begins at a multiple of `size` bytes."""
    itemsize = t.element_size()
    if t.is_contiguous():
        return t.data_ptr() % size == 0 and t.shape[-1] * itemsize % size == 0
    strides, shape = t.stride(), t.shape
    if strides[-1] != 1 and shape[-1] > 1:  # the copy is contiguous
        return shape[-1] * itemsize % size == 0
    return t.data_ptr() % size == 0 and all(
        [n == 1 or s * itemsize % size == 0 for n, s in zip(shape[:-1], strides)]
    )


def _can_copy_aligned(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether matrix instructions can load q, k and v."""
    size = k.element_size()
    return (
        q.element_size() == 2
        and q.shape[-1] * size % _COPY == 0
        and v.shape[-1] * size % _COPY == 0
        and _is_aligned(k, _COPY)
        and _is_aligned(v, _COPY)
    )


def _is_supported(q: Tensor, k: Tensor, v: Tensor, *_) -> bool:
    _, queries, heads, width = q.shape
    rows, v_width = queries * (heads // k.shape[2]), v.shape[3]
    size = k.element_size()
    limits = constants()
    if (
        # more rows of one query use matrix instructions in groups
        (rows > limits.PAGED_MMA_ROWS and queries > 1)
        or width > limits.PAGED_MAX_WIDTH
        or v_width > limits.PAGED_MAX_WIDTH
        or width % 8
        or v_width % 8
        or k.dtype != v.dtype  # one of them int8
        or not _is_aligned(q, _COPY)
    ):
        return False
    if rows > limits.PAGED_DOT_ROWS and _can_copy_aligned(q, k, v):
        return _fits(q.device, _rows_per_tile(rows), width, v_width, size)
    load = 8 if size == 1 else _COPY
    return rows <= _MAX_DOT_ROWS and _is_aligned(k, load) and _is_aligned(v, load)


SUPPORT = Support(  # the limits of csrc/cuda/ops.h, which a machine without the extension lacks
    "D and Dv multiples of 8, up to 256; one query, or up to 64 rows of q per key head, 8 in"
    " float32; aligned to 16 bytes, a cache of int8 to 8",
    _is_supported,
)


def _rows_per_block(rows: int, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Return how many rows a unit has at a time (csrc/cuda/ops.h), for dot products or for matrix
    instructions. `rows` are those per key head; `_is_supported` has accepted the arguments."""
    max_dot_rows = constants().PAGED_DOT_ROWS
    use_dots = rows <= max_dot_rows or q.element_size() == 4
    if not use_dots and rows <= _MAX_DOT_ROWS and k.element_size() == 1:
        use_dots = not _can_copy_aligned(q, k, v)  # always true for a cache of 16 bits
    if use_dots:
        return 1 if rows == 1 else max_dot_rows
    return _rows_per_tile(rows)


def _rows_per_tile(rows: int) -> int:
    return 16 if rows <= 16 else constants().PAGED_MMA_ROWS


def _contiguous_float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, sinks: Tensor | None,
    alibi_slopes: Tensor | None, bias: Tensor | None, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k_cache, v_cache = dense_rows(q, k_cache, v_cache)
    batch, queries, heads, _ = q.shape
    per_head, v_width = queries * (heads // k_cache.shape[2]), v_cache.shape[3]
    rows = _rows_per_block(per_head, q, k_cache, v_cache)
    out = q.new_empty(batch, queries, heads, v_width)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    # two blocks per multiprocessor, where there are enough tiles
    units = batch * k_cache.shape[2] * -(-queries * heads // k_cache.shape[2] // rows)
    min_tiles = constants().PAGED_MIN_TILES
    tiles = -(-table.shape[1] * k_cache.shape[1] // constants().PAGED_TILE)
    blocks = min(2 * multiprocessors(q.device), units * max(1, -(-tiles // min_tiles)))
    kernels = extension()
    workspace = lse.new_empty(kernels.paged_attention_workspace(rows, blocks, v_width))
    kernels.paged_attention_forward(
        q, k_cache, v_cache, table, seq_lens.contiguous(), k_scale, v_scale,
        _contiguous_float(sinks), _contiguous_float(alibi_slopes),
        None if bias is None else bias.float(), options.causal, options.scale, options.window,
        options.softcap, rows, blocks, min_tiles, out, lse, workspace, stream(q),
    )  # fmt: skip
    return out, lse
