"""paged_attention through csrc/cuda/paged_attention.cu: the decode step.

It serves up to 64 rows of q per key head (queries times the group of heads that share it), a single
query of any group, and up to 8 rows in float32. Head widths must be multiples of 8 up to 256. Rows
must begin at multiples of 16 bytes (of 8 in an int8 cache). The rest goes to the Triton kernel.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import backend, reference
from fastlm.cuda import extension, multiprocessors, stream
from fastlm.memory_order import elements_last
from fastlm.reference import AttentionOptions

_TILE = 64  # keys, as in csrc/cuda/paged_attention.cuh
_LEAST_TILES = 4  # worth a block of their own: 256 keys, as in kernels/attention.py
_WIDEST = 256
_MOST_ROWS = 64  # with several queries; more rows of one query use matrix instructions in groups
_DOT_ROWS = 2  # at a time: more need more registers than two blocks per multiprocessor have
# Rows that matrix instructions cannot handle (float32, for one) read K and V once per two rows.
_MOST_DOT_ROWS = 8


@functools.cache
def _fits(device: torch.device, rows: int, width: int, v_width: int, size: int) -> bool:
    """Whether a block has enough shared memory: rows of width 256 need 143 KiB, more than an L40S
    has; with 64 rows of q 168 KiB, more than an A100 has."""
    if device.type != "cuda":
        return True
    most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return extension().paged_attention_shared(rows, width, v_width, size) <= most


def _aligned(t: Tensor, size: int) -> bool:
    """Whether every row begins at a multiple of `size` bytes."""
    each = t.element_size()
    if t.data_ptr() % size:
        return False
    if t.is_contiguous():
        return t.shape[-1] * each % size == 0
    return all(n == 1 or s * each % size == 0 for n, s in zip(t.shape[:-1], t.stride()))


def _rows_of_a_block(q: Tensor, k: Tensor, v: Tensor) -> int:
    """1 or 2 by dot products, 16 or 64 by matrix instructions; 0: not by this kernel."""
    q_shape, width, v_width = q.shape, q.shape[-1], v.shape[-1]
    rows = q_shape[1] * (q_shape[2] // k.shape[2])
    size = k.element_size()
    if (
        (rows > _MOST_ROWS and q_shape[1] > 1)
        or max(width, v_width) > _WIDEST
        or width % 8
        or v_width % 8
        or k.dtype != v.dtype  # one of them int8
        or not _aligned(q, 16)
    ):
        return 0
    whole = _aligned(k, 16) and _aligned(v, 16)
    if rows > _DOT_ROWS and q.element_size() == 2 and whole and width * size % 16 == 0:
        if v_width * size % 16 == 0:
            rows = 16 if rows <= 16 else 64
            return rows if _fits(q.device, rows, width, v_width, size) else 0
    if rows > _MOST_DOT_ROWS or not (whole or (size == 1 and _aligned(k, 8) and _aligned(v, 8))):
        return 0
    return 1 if rows == 1 else 2


def _other(q: Tensor) -> Callable:
    """The function for what this kernel does not serve; the emulator has no Triton kernel."""
    if q.is_cuda and backend.why_not("triton") is None:
        return backend.OPS["paged_attention"].load(backend.BACKENDS["triton"])
    return reference.paged_attention


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, sinks: Tensor | None,
    alibi_slopes: Tensor | None, bias: Tensor | None, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k_cache, v_cache = elements_last(q, k_cache, v_cache)
    rows = _rows_of_a_block(q, k_cache, v_cache)
    if not rows:
        return _other(q)(
            q, k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, sinks, alibi_slopes, bias,
            options,
        )  # fmt: skip
    batch, queries, heads, _ = q.shape
    v_width = v_cache.shape[3]
    out = q.new_empty(batch, queries, heads, v_width)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    # two blocks per multiprocessor, where there are enough tiles
    units = batch * k_cache.shape[2] * -(-queries * heads // k_cache.shape[2] // rows)
    tiles = -(-table.shape[1] * k_cache.shape[1] // _TILE)
    blocks = min(2 * multiprocessors(q.device), units * max(1, -(-tiles // _LEAST_TILES)))
    # two slots per block: out, largest score and sum of each row; and a record of 4 numbers
    workspace = lse.new_empty(blocks * (2 * rows * (v_width + 2) + 4))
    extension().paged_attention_forward(
        q, k_cache, v_cache, table, seq_lens.contiguous(), k_scale, v_scale, _floats(sinks),
        _floats(alibi_slopes), None if bias is None else bias.float(), options.causal,
        options.scale, options.window, options.softcap, rows, blocks, _LEAST_TILES, out, lse,
        workspace, stream(q),
    )  # fmt: skip
    return out, lse
