"""flash-attn 2's functions with its documented signatures, on `fastlm.ops`, CPUs included::

    from fastlm.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

Tensors are (B, S, H, D), packed ones (total, H, D). Any head width, float32 as well. Differences:

- ``deterministic`` and ``num_splits`` have no effect: every backward here is bitwise reproducible.
- ``return_attn_probs`` returns (out, lse, an empty tensor), as flash-attn does without dropout.
  With dropout it is refused, since no probabilities are stored here. lse is differentiable, and
  -inf where a row sees no keys.
- Dropout draws different random numbers.
- Pages of ``block_table`` may have any size; ``cache_leftpad`` works with them.
- ``flash_attn_with_kvcache`` has no backward, like flash-attn's; tensors that need it are refused.

A window that looks ahead (right > 0, or only a left limit without ``causal``) and slopes that
differ within the batch become a bias in memory: (S, T), or (B, H, S, T) for the slopes. Everything
else is free.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops import attention, paged_append, paged_attention, rope, varlen_attention
from fastlm.ops.paged_attention import checked
from fastlm.ops.paged_attention import op as paged

Window = tuple[int, int]  # keys seen to the left and to the right, -1: all


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

    Query i sees keys i + T - S - left to i + T - S + right; ``causal`` is right = 0. alibi_slopes:
    (H,) or (B, H). lse is (B, H, S).
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise InputError(f"{name}: wanted (B, length, heads, D), got {tuple(t.shape)}")
    rows, keys = q.shape[1], k.shape[1]
    options = _options(q, causal, window_size, alibi_slopes, rows, keys, keys - rows)
    out, lse = attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        **options, **_numbers(softmax_scale, softcap), dropout_p=dropout_p, return_lse=True,
    )  # fmt: skip
    return _result(q, out.transpose(1, 2), lse, dropout_p, return_attn_probs)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that passes its ``options`` on the signature that flash-attn's has."""
    own = inspect.signature(function).parameters.values()
    _, _, _, *options = inspect.signature(flash_attn_func).parameters.values()  # after q, k, v
    tensors = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    setattr(function, "__signature__", inspect.Signature([*tensors, *options]))  # noqa: B010
    return function


@_with_options
def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **options: Any) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D), read in place."""
    q, k, v = _parts("qkv", qkv, 3, 5)
    return flash_attn_func(q, k, v, *args, **options)


@_with_options
def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """`flash_attn_func` of q (B, S, H, D) and kv (B, T, 2, Hkv, D), read in place."""
    k, v = _parts("kv", kv, 2, 5)
    return flash_attn_func(q, k, v, *args, **options)


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
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(t, Tensor):
            raise InputError(f"{name}: wanted a tensor (B + 1,), got {type(t).__name__}")
        if t.dim() != 1:
            raise InputError(f"{name}: wanted (B + 1,), got {tuple(t.shape)}")
    for side, cu, given in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        if _looks(q) and len(cu) > 1 and (longest := int(cu.diff().max())) > given:
            raise InputError(f"max_seqlen_{side}: wanted at least {longest}, got {given}")
    numbers = _numbers(softmax_scale, softcap)
    lengths = cu_seqlens_k.diff()
    if block_table is not None:
        if dropout_p:
            raise InputError(f"dropout_p: wanted 0 with block_table, got {dropout_p}")
        options = _options(
            q, causal, window_size, alibi_slopes, max_seqlen_q,
            block_table.shape[1] * k.shape[1], _per_sequence(lengths - max_seqlen_q),
        )  # fmt: skip
        # a sequence ends at the last padded row: row r of sequence b is row first[b] + r of q
        first = cu_seqlens_q[1:] - max_seqlen_q
        place = first[:, None] + torch.arange(max_seqlen_q, device=q.device)
        padded = q[place.clamp(0, max(q.shape[0] - 1, 0))]
        out, lse = paged_attention(
            padded, k, v, block_table, lengths, **options, **numbers, return_lse=True
        )
        token = torch.arange(q.shape[0], device=q.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
        row = token - first[sequence]
        out, lse = out[sequence, row], lse[sequence, :, row].mT
    else:
        options = _options(
            q, causal, window_size, alibi_slopes, max_seqlen_q, max_seqlen_k,
            _per_sequence(lengths - cu_seqlens_q.diff()),
        )  # fmt: skip
        out, lse = varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, **options, **numbers, dropout_p=dropout_p, return_lse=True,
        )  # fmt: skip
    return _result(q, out, lse, dropout_p, return_attn_probs)


@_with_options
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **options: Any
) -> Any:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, 3, 4)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return flash_attn_varlen_func(q, k, v, *lengths, *args, **options)


@_with_options
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **options: Any,
) -> Any:
    """`flash_attn_varlen_func` of q (total_q, H, D) and kv (total_k, 2, Hkv, D)."""
    k, v = _parts("kv", kv, 2, 4)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(q, k, v, *lengths, *args, **options)


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
        cache_leftpad: (B,), number of keys at the beginning of the row that are hidden.
        block_table: (B, pages per sequence).
        rotary_cos, rotary_sin: (positions, R / 2), only with k: k is rotated at positions from
            cache_seqlens on. So is q if causal or windowed; else all of q is at cache_seqlens.
        rotary_interleaved: pairs (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...

    Returns:
        out (B, S, H, D); with return_softmax_lse the pair of out and lse (B, H, S).

    Raises:
        InputError: as `fastlm.ops.paged_attention`; a shape or dtype that does not fit; on the CPU
            also more keys than the cache has room for. The cache is then unchanged.
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if t is not None and t.dim() != 4:
            raise InputError(f"{name}: wanted 4 dimensions, got {tuple(t.shape)}")
        if t is not None and t.requires_grad:
            raise InputError(f"{name}: wanted a tensor without grad (detach it): no backward")
    batch, rows = q.shape[:2]
    page_size, device = k_cache.shape[1], q.device
    if q.dtype != k_cache.dtype or q.shape[3] != k_cache.shape[3]:
        raise InputError(
            f"q: wanted {k_cache.dtype} of width {k_cache.shape[3]} as k_cache,"
            f" got {q.dtype} {tuple(q.shape)}"
        )
    if (k is None) != (v is None):
        raise InputError("k, v: wanted both or neither, got one")
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise InputError("rotary_cos, rotary_sin: wanted both, with k and v, or neither, got some")
    if block_table is not None and cache_batch_idx is not None:
        raise InputError("cache_batch_idx: wanted None with block_table")
    if cache_seqlens is None and k is not None:
        raise InputError("cache_seqlens: wanted where k and v go, got None")
    for name, t, dim in (
        ("cache_seqlens", cache_seqlens, 1), ("cache_batch_idx", cache_batch_idx, 1),
        ("cache_leftpad", cache_leftpad, 1), ("block_table", block_table, 2),
    ):  # fmt: skip
        if isinstance(t, Tensor):
            integers = t.dtype in (torch.int32, torch.int64)
            if not integers or t.dim() != dim or len(t) != batch or t.device != device:
                raise InputError(
                    f"{name}: wanted {dim} dimension(s), B = {batch} rows, int32 on {device},"
                    f" got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
    chosen_by = "block_table"
    if block_table is None:  # each row of the cache is a page
        chosen_by = "" if cache_batch_idx is None else "cache_batch_idx"
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(batch, dtype=torch.int32, device=device)
        block_table = cache_batch_idx[:, None]
    capacity = block_table.shape[1] * page_size
    if not isinstance(cache_seqlens, Tensor):
        full = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), full, dtype=torch.int32, device=device)
    elif cache_seqlens.dtype != torch.int32:
        raise InputError(
            f"cache_seqlens: wanted a number or int32 ({batch},), a length for each row of q,"
            f" got {cache_seqlens.dtype} {tuple(cache_seqlens.shape)}"
        )
    lengths, new = cache_seqlens, 0
    if k is not None and v is not None:
        new = k.shape[1]
        for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
            wanted = (batch, new, *cache.shape[2:])
            if t.shape != wanted or t.dtype != cache.dtype or t.device != cache.device:
                raise InputError(
                    f"{name}: wanted {cache.dtype} {wanted} on {cache.device} as {name}_cache,"
                    f" got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
        lengths = cache_seqlens + new
    if _looks(q) and batch:
        room = capacity - new
        if rotary_cos is not None:
            room = min(room, rotary_cos.shape[0] - max(new, rows))
        shortest, longest = (int(t) for t in cache_seqlens.aminmax())
        if shortest < 0 or longest > room:
            raise InputError(
                f"cache_seqlens: wanted 0 to {room} with {new} new keys, a cache of {capacity}"
                f" (and its positions in rotary_cos), got {shortest if shortest < 0 else longest}"
            )
        if chosen_by and block_table.numel():
            read = torch.arange(block_table.shape[1]) * page_size < lengths[:, None]
            low, high = (int(t) for t in block_table.where(read, 0).aminmax())
            if low < 0 or high >= len(k_cache):
                raise InputError(
                    f"{chosen_by}: wanted 0 to {len(k_cache) - 1}, got {low if low < 0 else high}"
                )
        elif batch > len(k_cache):
            raise InputError(f"k_cache: wanted B = {batch} rows, got {tuple(k_cache.shape)}")
    place = cache_seqlens.long()[:, None] + torch.arange(new, device=device)
    if k is not None and rotary_cos is not None and rotary_sin is not None:
        ordered = causal or tuple(window_size) != (-1, -1)
        q_place = cache_seqlens.long()[:, None].expand(-1, rows)
        if ordered:
            q_place = q_place + torch.arange(rows, device=device)
        q, k = (
            _rotated(x, rotary_cos, rotary_sin, at, rotary_interleaved)
            for x, at in ((q, q_place), (k, place))
        )
    options = _options(
        q, causal, window_size, alibi_slopes, rows, capacity, _per_sequence(lengths - rows),
        cache_leftpad,
    )  # fmt: skip
    arguments = checked(
        q, k_cache, v_cache, block_table, lengths, **options, **_numbers(softmax_scale, softcap)
    )
    if k is not None and v is not None:  # nothing is refused from here on
        paged_append(k, v, k_cache, v_cache, block_table, place)
    out, lse = paged(*arguments)
    return (out, lse) if return_softmax_lse else out


def _looks(t: Tensor) -> bool:
    """Whether values may be read: reading them would wait for a GPU."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _numbers(softmax_scale: float | None, softcap: float) -> dict[str, Any]:
    return {"scale": softmax_scale, "softcap": softcap if softcap > 0 else None}


def _parts(name: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    if packed.dim() != dims or packed.shape[-3] != parts:
        raise InputError(
            f"{name}: wanted (..., {parts}, heads, D), {dims} dimensions, got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def _per_sequence(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _options(
    q: Tensor,
    causal: bool,
    window_size: Window,
    alibi_slopes: Tensor | None,
    rows: int,
    keys: int,
    offset: int | Tensor,
    leftpad: Tensor | None = None,
) -> dict[str, Any]:
    """Return causal, window, alibi_slopes and bias for `fastlm.ops`. `offset`, a number or (B, 1,
    1, 1), plus a query's row is its position among the keys."""
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise InputError(f"window_size: wanted (left, right), -1 for no limit, got {window_size!r}")
    left, right = window_size
    options: dict[str, Any] = {"alibi_slopes": alibi_slopes}
    if causal or right == 0:
        options |= {"causal": True, "window": left + 1 if left >= 0 else None}
        left = right = -1
    per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
    if per_batch and alibi_slopes is not None:
        wanted = (len(offset) if isinstance(offset, Tensor) else len(q), q.shape[-2])
        if alibi_slopes.shape != wanted:
            raise InputError(
                f"alibi_slopes: wanted {wanted[1:]} or (B, H) = {wanted},"
                f" got {tuple(alibi_slopes.shape)}"
            )
    if left < 0 and right < 0 and not per_batch and leftpad is None:
        return options
    key = torch.arange(keys, device=q.device)
    ahead = key - (torch.arange(rows, device=q.device)[:, None] + offset)
    seen = None
    if left >= 0 or right >= 0:
        seen = (ahead >= -left) if left >= 0 else (ahead <= right)
        if left >= 0 and right >= 0:
            seen = seen & (ahead <= right)
    if leftpad is not None:
        visible = key >= _per_sequence(leftpad)
        seen = visible if seen is None else seen & visible
    bias = seen
    if per_batch and alibi_slopes is not None:
        options["alibi_slopes"] = None
        bias = -alibi_slopes.detach()[:, :, None, None] * ahead.abs()
        bias = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
    return options | {"bias": bias}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, place: Tensor, interleaved: bool) -> Tensor:
    """Rotate x (B, S, H, D) by rows `place` (B, S) of tables of R / 2 angles."""
    tables = []
    for table in (cos, sin):
        half = F.embedding(place, table)
        tables.append(half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1))
    heads, turns = x.transpose(1, 2), 2 * cos.shape[1]
    turned, _ = rope(heads, heads[:, :0], *tables, interleaved=interleaved, rotary_dim=turns)
    return turned.transpose(1, 2)


def _result(q: Tensor, out: Tensor, lse: Tensor, dropout_p: float, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return out
    if dropout_p:
        raise InputError("return_attn_probs: wanted False with dropout: none are held")
    return out, lse, q.new_empty(0)
