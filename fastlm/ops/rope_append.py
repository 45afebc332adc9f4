"""Rotate queries and keys and append keys and values to a paged cache, in one launch.

A decode step on a GPU uses it. Elsewhere `rope` and `paged_append` do the same.
"""

from torch import Tensor

from fastlm import reference
from fastlm.operator import declare


def _fake(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


rope_append = declare(
    reference.rope_append, "cuda", fake=_fake, mutates_args=("k_cache", "v_cache")
)
