"""Rotates queries and keys and appends keys and values to a paged cache, in one launch: a decode
step on a GPU. Elsewhere `rope` and `paged_append` do the same.
"""

from torch import Tensor

from fastlm import reference
from fastlm.operator import declare


def _fake(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


rope_append = declare(
    reference.rope_append, "cuda", fake=_fake, mutates_args=("k_cache", "v_cache")
)
