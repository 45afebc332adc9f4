"""Append keys and values to a paged cache, also in int8, which `paged_attention` reads."""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.operator import declare, is_autocast_on
from fastlm.ops.attention import as_int32
from fastlm.ops.paged_attention import cache_scales
from fastlm.ops.wrong_type import TYPE_FAILURES, explain


def paged_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> None:
    """``k_cache[block_table[b, p // page_size], p % page_size] = k[b, s]`` with
    p = positions[b, s], in place; the same for v.

    An int8 cache receives ``round(k / k_scale)``, ties to even, clamped to -127 to 127.

    Args:
        k: (B, S, Hkv, D), v: (B, S, Hkv, Dv), float32, bfloat16 or float16. Under
            ``torch.autocast`` they are cast to the dtype of a cache that is not int8.
        k_cache: (pages, page_size, Hkv, D), v_cache: (pages, page_size, Hkv, Dv): k's dtype, or
            int8 with scales. Any page size; the elements of a head are contiguous, all other
            strides are free.
        block_table: (B, max_pages) int32 or int64.
        positions: (B, S) int32 or int64. A token below 0, beyond the table or on a page that the
            cache does not have (rows of a padded batch) is left out. No two tokens may have the
            same slot.
        k_scale, v_scale: value of one int8 step, for int8 caches only: a number, or a tensor of
            shape () or (Hkv,).

    On a GPU nothing waits for the device. There is no autograd.

    Raises:
        InputError: shapes, dtypes, devices or scales that do not fit.
    """
    try:
        for name, t in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
            if t.dim() != 4:
                raise InputError(f"{name}: expected 4 dimensions, got {tuple(t.shape)}")
        if (
            k_cache.is_floating_point()
            and not k.dtype == v.dtype == k_cache.dtype
            and is_autocast_on(k)
        ):
            k, v = k.to(k_cache.dtype), v.to(k_cache.dtype)
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            shape = (*k.shape[:2], *cache.shape[2:])
            if x.shape != shape or x.dtype != k.dtype or x.device != k.device:
                raise InputError(
                    f"{name}: expected {k.dtype} {shape} on {k.device} as k and {name}_cache,"
                    f" got {x.dtype} {tuple(x.shape)} on {x.device}"
                )
        if not k.is_floating_point():
            raise InputError(f"k: expected a float dtype, got {k.dtype}")
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            shape_fits = cache.shape[:3] == k_cache.shape[:3] and cache.shape[1] > 0
            dtype_fits = cache.dtype in (k.dtype, torch.int8) and cache.dtype == k_cache.dtype
            if not shape_fits or not dtype_fits or cache.device != k.device:
                raise InputError(
                    f"{name}: expected (pages, page_size, Hkv, width) of {k.dtype} or int8 on"
                    f" {k.device}, the same for both, got {cache.dtype} {tuple(cache.shape)} on"
                    f" {cache.device}"
                )
            if any(n > 1 and stride == 0 for n, stride in zip(cache.shape, cache.stride())):
                raise InputError(
                    f"{name}: expected memory for every element, got an expanded tensor"
                )
            if cache.shape[3] > 1 and cache.stride(3) != 1:
                raise InputError(
                    f"{name}: expected elements of a head side by side, got stride "
                    f"{cache.stride(3)}"
                )
        for name, t, rows in (
            ("block_table", block_table, k.shape[:1]),
            ("positions", positions, k.shape[:2]),
        ):
            dtype_fits = t.dtype in (torch.int32, torch.int64) and t.device == k.device
            if t.dim() != 2 or t.shape[: len(rows)] != rows or not dtype_fits:
                raise InputError(
                    f"{name}: expected int32, 2 dimensions, the first {tuple(rows)}, on {k.device},"
                    f" got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
        if torch.is_grad_enabled() and any(t.requires_grad for t in (k, v, k_cache, v_cache)):
            raise InputError(
                "k, v, k_cache, v_cache: expected tensors without grad (it has no backward),"
                " got one that requires grad"
            )
        _append(
            k, v, k_cache, v_cache, as_int32(block_table), as_int32(positions),
            cache_scales("k", k_scale, k_cache), cache_scales("v", v_scale, v_cache),
        )  # fmt: skip
    except TYPE_FAILURES as error:
        raise explain(error, paged_append, locals()) from None


_append = declare(reference.paged_append, "cpu triton cuda", mutates_args=("k_cache", "v_cache"))
