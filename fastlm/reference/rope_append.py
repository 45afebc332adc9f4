"""The definition of `rope_append`."""

from torch import Tensor

from fastlm.reference.paged_append import paged_append
from fastlm.reference.rope import rope


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> Tensor:
    """Rotate q and k by their positions (`rope`), append k and v (`paged_append`), return q.

    Args:
        q: (B, S, H, D), k: (B, S, Hkv, D), v: (B, S, Hkv, Dv): one float dtype, the caches' too.
        cos, sin: (P, R) float32, one row per position. A position without a row has the nearest.
        k_cache, v_cache, block_table, positions: as for `paged_append`.
    """
    rows = positions.long().clamp(0, cos.shape[0] - 1)
    q, k = (t.transpose(1, 2) for t in (q, k))
    q, k = (t.transpose(1, 2) for t in rope(q, k, cos[rows], sin[rows], False, False))
    paged_append(k, v, k_cache, v_cache, block_table, positions, None, None)
    return q.contiguous()
