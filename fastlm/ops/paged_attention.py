"""Attention on a paged key-value cache (Kwon et al. 2023, arXiv:2309.06180), also in int8."""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.cuda.paged_attention import SUPPORT
from fastlm.errors import InputError
from fastlm.flops import has_values
from fastlm.operator import declare, is_autocast_on
from fastlm.ops.attention import as_int32, check_option_tensors, check_options, wide_dtype
from fastlm.ops.wrong_type import TYPE_FAILURES, explain


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the S newest positions of each sequence on its keys and values in pages.

    Key j of sequence b is ``k_cache[block_table[b, j // page_size], j % page_size]``. The sequence
    has ``seq_lens[b]`` keys, including those of q: with causal, the last query sees all of them.

    Args:
        q: (B, S, H, D), float32, bfloat16 or float16. Under ``torch.autocast`` it is cast to the
            dtype of a cache that is not int8.
        k_cache: (pages, page_size, Hkv, D), v_cache: (pages, page_size, Hkv, Dv): q's dtype, or
            int8 with scales. Any page size.
        block_table: (B, max_pages) int32 or int64; entries past a sequence's last page are not
            read.
        seq_lens: (B,) int32 or int64.
        k_scale, v_scale: value of one int8 step, for int8 caches only: a number, or a tensor of
            shape () or (Hkv,).
        bias: broadcast to (B, H, S, longest T); a shorter sequence uses the first keys of it.
        return_lse: also return lse (B, H, S), float32.

    Returns:
        (B, S, H, Dv). There is no autograd: the op is for generation.

    Raises:
        InputError: as `attention`; scales that do not fit; on the CPU, a page outside the cache or
            a length beyond the table (this check would wait for a GPU, whose kernels stay inside).
    """
    try:
        out, lse = op(
            *check_arguments(
                q, k_cache, v_cache, block_table, seq_lens, k_scale=k_scale, v_scale=v_scale,
                causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
                alibi_slopes=alibi_slopes, bias=bias,
            )
        )  # fmt: skip
        return (out, lse) if return_lse else out
    except TYPE_FAILURES as error:
        raise explain(error, paged_attention, locals()) from None


def check_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple:
    """Return the arguments of `op`, after all checks of `paged_attention` that read no values.

    The caches are passed on without a copy, so that writes to them before `op` runs count.
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4:
            raise InputError(f"{name}: expected 4 dimensions, got {tuple(t.shape)}")
    if q.dtype != k_cache.dtype and k_cache.is_floating_point() and is_autocast_on(q):
        q = q.to(k_cache.dtype)
    if v_cache.shape[:3] != k_cache.shape[:3] or k_cache.shape[1] == 0:
        raise InputError(
            f"v_cache: expected (pages, page_size, Hkv, Dv) as k_cache {tuple(k_cache.shape)},"
            f" got {tuple(v_cache.shape)}"
        )
    for name, t, dim in (("block_table", block_table, 2), ("seq_lens", seq_lens, 1)):
        fits = t.dtype in (torch.int32, torch.int64) and t.device == q.device
        if t.dim() != dim or t.shape[0] != q.shape[0] or not fits:
            raise InputError(
                f"{name}: expected {dim} dimension(s), B = {q.shape[0]} rows, int32 on {q.device}, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k_cache, v_cache, sinks, bias)
    ):
        raise InputError(
            "q, k_cache, v_cache, sinks, bias: expected tensors without grad (it has no backward:"
            " use attention), got one that requires grad"
        )
    if bias is None:
        bias_shape = (q.shape[0], q.shape[2], q.shape[1], 1)
    else:
        bias_shape = (q.shape[0], q.shape[2], q.shape[1], bias.shape[-1] if bias.dim() else 1)
    bias = check_option_tensors(
        q, k_cache, v_cache, sinks, alibi_slopes, bias, k_cache.shape[2], bias_shape, (torch.int8,)
    )
    return (
        q, k_cache, v_cache, as_int32(block_table), as_int32(seq_lens),
        cache_scales("k", k_scale, k_cache), cache_scales("v", v_scale, v_cache), sinks,
        alibi_slopes, bias, check_options(q, causal, scale, window, softcap),
    )  # fmt: skip


def cache_scales(name: str, scale: float | Tensor | None, cache: Tensor) -> Tensor | None:
    """(Hkv,) float32, or None for a cache that is not int8."""
    if (scale is None) == (cache.dtype == torch.int8):
        expected = (
            "a number or a tensor (int8 cache)" if scale is None else f"None ({cache.dtype} cache)"
        )
        raise InputError(
            f"{name}_scale: expected {expected}, got {'None' if scale is None else 'one'}"
        )
    if scale is None:
        return None
    heads = cache.shape[2]
    if not isinstance(scale, Tensor):
        return torch.full((heads,), scale, dtype=torch.float32, device=cache.device)
    if scale.shape not in ((), (1,), (heads,)) or scale.device != cache.device:
        raise InputError(
            f"{name}_scale: expected shape () or ({heads},) on {cache.device},"
            f" got {tuple(scale.shape)} on {scale.device}"
        )
    return scale.float().expand(heads).contiguous()


def _fake(q, k_cache, v_cache, *_):
    b, s, h, _ = q.shape
    return (
        q.new_empty(b, s, h, v_cache.shape[3]),
        q.new_empty(b, h, s, dtype=wide_dtype(q)),
    )


def _flops(q, k_cache, v_cache, block_table, seq_lens, *_, **__):
    _, queries, heads, width = q.shape
    capacity = block_table.numel() * k_cache.shape[1]
    keys = int(seq_lens.sum()) if has_values(seq_lens) else capacity
    return 2 * queries * heads * keys * (width + v_cache.shape[3])


op = declare(
    reference.paged_attention,
    "cpu triton cuda",
    supports={"cuda": SUPPORT},
    fake=_fake,
    flops_by_values=_flops,
)
