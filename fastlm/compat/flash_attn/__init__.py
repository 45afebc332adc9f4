"""flash-attn 2's functions with its documented signatures on `fastlm.ops`, on CPUs too::

    from fastlm.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

Tensors are (B, S, H, D), packed ones (total, H, D). Any head width, float32 as well. Differences:

- ``deterministic`` and ``num_splits`` have no effect: every backward here is bitwise reproducible.
- ``return_attn_probs`` returns (out, lse, an empty tensor), as flash-attn does without dropout.
  With dropout it is refused, because no probabilities are stored. lse is differentiable. It is -inf
  where a row sees no keys.
- Dropout draws different random numbers.
- Pages of ``block_table`` may have any size.
- The functions of packed tensors are missing: ``flash_attn_func(*qkv.unbind(2))`` reads q, k and v
  where they are.
- ``alibi_slopes`` are (H,): slopes that differ within the batch are refused. So are
  ``flash_attn_with_kvcache``'s ``cache_leftpad`` and ``rotary_cos`` (`fastlm.ops.rope` rotates).
- ``flash_attn_with_kvcache`` has no backward, like flash-attn's; tensors that need it are refused.

A window that looks ahead (right > 0, or only a left limit without ``causal``) becomes a bias (S, T)
in memory. Nothing else costs extra.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops import attention, paged_append, paged_attention, varlen_attention
from fastlm.ops.paged_attention import check_arguments
from fastlm.ops.paged_attention import op as paged_op

Window = tuple[int, int]  # visible keys to the left and to the right, -1: all


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`fastlm.ops.attention` of q (B, S, H, D), k and v (B, T, Hkv, D) -> (B, S, H, D).

    Query i sees keys i + T - S - left to i + T - S + right; ``causal`` is right = 0. lse is
    (B, H, S).
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise InputError(f"{name}: expected (B, length, heads, D), got {tuple(t.shape)}")
    rows, keys = q.shape[1], k.shape[1]
    out, lse = attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        **_mask(q, causal, window_size, rows, keys, keys - rows),
        **_score_options(softmax_scale, softcap, alibi_slopes),
        dropout_p=dropout_p,
        return_lse=True,
    )
    return _result(q, out.transpose(1, 2), lse, dropout_p, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` of each sequence in q (total_q, H, D), k and v (total_k, Hkv, D).

    With block_table (B, pages per sequence), k and v are pages (pages, page_size, Hkv, D), and
    ``cu_seqlens_k`` holds the lengths of their sequences. q is then padded to max_seqlen_q rows per
    sequence, and there is neither dropout nor a backward. lse is (H, total_q).
    """
    sides = ("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)
    for side, cu, max_seqlen in sides:
        if not isinstance(cu, Tensor) or cu.dim() != 1:
            got = tuple(cu.shape) if isinstance(cu, Tensor) else type(cu).__name__
            raise InputError(f"cu_seqlens_{side}: expected a tensor (B + 1,), got {got}")
        if _can_read(q) and len(cu) > 1 and (longest := int(cu.diff().max())) > max_seqlen:
            raise InputError(f"max_seqlen_{side}: expected at least {longest}, got {max_seqlen}")
    options: dict[str, Any] = _score_options(softmax_scale, softcap, alibi_slopes)
    options["return_lse"] = True
    lengths = cu_seqlens_k.diff()
    if block_table is None:
        offset = _per_sequence(lengths - cu_seqlens_q.diff())
        options |= _mask(q, causal, window_size, max_seqlen_q, max_seqlen_k, offset)
        out, lse = varlen_attention(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k),
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            dropout_p=dropout_p,
            **options,
        )
        return _result(q, out, lse, dropout_p, return_attn_probs)
    if dropout_p:
        raise InputError(f"dropout_p: expected 0 with block_table, got {dropout_p}")
    keys = block_table.shape[1] * k.shape[1]
    offset = _per_sequence(lengths - max_seqlen_q)
    options |= _mask(q, causal, window_size, max_seqlen_q, keys, offset)
    # a sequence ends at the last padded row: row r of sequence b is row first[b] + r of q
    first = cu_seqlens_q[1:] - max_seqlen_q
    positions = first[:, None] + torch.arange(max_seqlen_q, device=q.device)
    padded = q[positions.clamp(0, max(q.shape[0] - 1, 0))]
    out, lse = paged_attention(padded, k, v, block_table, lengths, **options)
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
    row = token - first[sequence]
    return _result(q, out[sequence, row], lse[sequence, :, row].mT, dropout_p, return_attn_probs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append k and v (B, S_new, Hkv, D) to a cache and return q's (B, S, H, D) attention over it.

    Args:
        k_cache, v_cache: (rows, T, Hkv, D), or pages (pages, page_size, Hkv, D) with block_table.
            Written in place.
        cache_seqlens: keys per sequence before k is appended, a number or (B,); T by default,
            required with k.
        cache_batch_idx: (B,), the cache row of each sequence; 0 to B - 1 by default.
        block_table: (B, pages per sequence).

    Returns:
        out (B, S, H, D); with return_softmax_lse the pair of out and lse (B, H, S).

    Raises:
        InputError: as `fastlm.ops.paged_attention` and `paged_append`; on the CPU also more keys
            than fit in the cache. Keys before cache_seqlens are then unchanged.
    """
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v), ("q", q)):
        if t is not None and t.requires_grad:
            raise InputError(f"{name}: expected a tensor without grad (detach it): no backward")
    refused = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "cache_leftpad": cache_leftpad}
    if block_table is not None:
        refused["cache_batch_idx"] = cache_batch_idx  # the table names the pages
    for name, t in refused.items():
        if t is not None:
            raise InputError(f"{name}: expected None here, got a tensor {tuple(t.shape)}")
    if (k is None) != (v is None):
        raise InputError("k, v: expected both or neither, got one")
    (batch, rows), new = q.shape[:2], 0 if k is None else k.shape[1]
    if block_table is None:  # each row of the cache is a page
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(batch, dtype=torch.int32, device=q.device)
        block_table = cache_batch_idx[:, None]
    capacity = block_table.shape[1] * k_cache.shape[1]
    if cache_seqlens is None:
        cache_seqlens = capacity  # refused below if there are k and v to append
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if _can_read(q) and batch:
        shortest, longest = (int(t) for t in cache_seqlens.aminmax())
        if shortest < 0 or longest > capacity - new:
            raise InputError(
                f"cache_seqlens: expected 0 to {capacity - new} with {new} new keys, a cache of"
                f" {capacity}, got {shortest if shortest < 0 else longest}"
            )
    lengths = cache_seqlens + new
    arguments = check_arguments(
        *(q, k_cache, v_cache, block_table, lengths),
        **_mask(q, causal, window_size, rows, capacity, _per_sequence(lengths - rows)),
        **_score_options(softmax_scale, softcap, alibi_slopes),
    )
    if k is not None and v is not None:
        positions = cache_seqlens.long()[:, None] + torch.arange(new, device=q.device)
        paged_append(k, v, k_cache, v_cache, block_table, positions)
    out, lse = paged_op(*arguments)
    return (out, lse) if return_softmax_lse else out


def _can_read(t: Tensor) -> bool:
    """Return whether values may be read: reading them would wait for a GPU."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _score_options(
    softmax_scale: float | None, softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    cap = softcap if softcap > 0 else None
    return {"scale": softmax_scale, "softcap": cap, "alibi_slopes": alibi_slopes}


def _per_sequence(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _mask(
    q: Tensor, causal: bool, window_size: Window, rows: int, keys: int, offset: int | Tensor
) -> dict[str, Any]:
    """Return causal, window and bias for `fastlm.ops`. `offset`, a number or (B, 1, 1, 1), plus a
    query's row is its position among the keys.
    """
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise InputError(
            f"window_size: expected (left, right), -1 for no limit, got {window_size!r}"
        )
    left, right = window_size
    if causal or right == 0:
        return {"causal": True, "window": left + 1 if left >= 0 else None}
    if left < 0 and right < 0:
        return {}
    left, right = (math.inf if limit < 0 else limit for limit in window_size)
    position = torch.arange(rows, device=q.device)[:, None] + offset
    ahead = torch.arange(keys, device=q.device) - position
    return {"bias": (ahead >= -left) & (ahead <= right)}


def _result(q: Tensor, out: Tensor, lse: Tensor, dropout_p: float, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return out
    if dropout_p:
        raise InputError("return_attn_probs: expected False with dropout: none are stored")
    return out, lse, q.new_empty(0)
